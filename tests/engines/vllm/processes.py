"""Engines in processes of their own, as tests talk to them."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from engines.vllm.releases import HAS_FIXED_SEED

WAIT_S = 240.0


class Engine:
    """A vLLM that starts in the background; the first call waits for it."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        # the interpreter is for tests of kernels; an engine on a CPU takes the reference ops
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if not HAS_FIXED_SEED:
            environment["PYTHONHASHSEED"] = "0"
        reader, writer = os.pipe()
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "engines.vllm.engine_process",
                    str(folder / "config.json"),
                    str(writer),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                text=True,
                env=environment,
            )
        os.close(writer)
        self._answers: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Of the process that started the engine's others."""
        return self._process.pid

    def run(self, prompts: list[list[int]], max_tokens: int = 16, **options: Any) -> list[dict[str, Any]]:
        """Answers to prompts, all at once."""
        return self("run", prompts=prompts, max_tokens=max_tokens, **options)["answers"]

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What one call comes to."""
        self.send(do, **arguments)
        return self.receive()

    def send(self, do: str, **arguments: Any) -> None:
        """Begin a call."""
        self.wait_until_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """What the call has come to."""
        try:
            line = self._answers.get(timeout=WAIT_S)
        except queue.Empty:
            raise AssertionError(f"the engine does not answer:\n{self.log()[-3000:]}") from None
        assert line, f"the engine has ended:\n{self.log()[-3000:]}"
        return json.loads(line)

    def wait_until_ready(self) -> None:
        """Return when the engine serves."""
        if not self._is_ready:
            assert self.receive() == {"ready": True}
            self._is_ready = True

    def fails_to_start(self) -> str:
        """What it says when it ends by itself, with a failure."""
        assert self._process.wait(WAIT_S) != 0
        return self.log()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Let it end, or end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, reader: int) -> None:
        with os.fdopen(reader) as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")
