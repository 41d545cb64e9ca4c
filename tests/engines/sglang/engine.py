"""An engine in a process of its own, and what it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from store.running_server import wait_until

WORKER = Path(__file__).with_name("engine_worker.py")


class Engine:
    """SGLang on the CPU. `log` holds what its processes print.

    Args:
        log: Where that goes.
        arguments: Of `sglang.Engine`, beside those of `engine_worker`; None leaves one to SGLang.
        environment: Variables beside this process's.
    """

    def __init__(
        self, log: Path, arguments: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | (environment or {}),
            )
        assert self._answer() == "ready", self.log

    @property
    def log(self) -> str:
        """What its processes have printed."""
        return self._log.read_text(errors="replace")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log[-5000:]
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        """The answer to one request of `engine_worker`."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def generate(self, tokens: list[int] | list[list[int]], num_new: int) -> Any:
        """Greedy tokens after a prompt, and where its prefix came from; a list for several prompts."""
        return self.ask(do="generate", tokens=tokens, num_new=num_new)

    def flush(self) -> None:
        """Forget all prefixes, as soon as SGLang has nothing under way."""
        wait_until(lambda: self.ask(do="flush"))

    def stop(self) -> None:
        """Let it end; an engine that does not is killed."""
        with self._process:  # which closes its pipes, and waits
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(60)
            finally:
                self._process.kill()
