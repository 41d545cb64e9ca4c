"""`tq-store serve` in a process of its own, as operators start it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from store.running_server import WAIT_S

CLI = [str(Path(sys.executable).with_name("tq-store"))]


class ServerProcess:
    """Ready when this is made; killed when the block ends.

    What it logs goes to a file, so that a server that says much is not held up by who reads it.
    """

    def __init__(
        self, *options: object, listen: str = "127.0.0.1:0", environment: Mapping[str, str] | None = None
    ) -> None:
        command = [*CLI, "serve", "--listen", listen, "--metrics-port", "0", *map(str, options)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the process has ended
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment or os.environ
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("tq-store serves on "), self.end()
        self.address = line.split()[3].rstrip(",")
        self.metrics_url = line.split()[-1]

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def metric(self, name: str) -> float:
        """A metric without labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=WAIT_S) as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found, f"the server exports no {name}"
        return float(found[1])

    def is_receiving(self) -> bool:
        """Whether a block is on its way to the server, and has been begun."""
        return self.metric("tq_store_inflight_bytes") > 0

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns the exit code and what was logged."""
        self._process.wait(WAIT_S)
        return self._process.returncode, self.log()

    def log(self) -> str:
        """What was logged so far."""
        with open(f"/proc/self/fd/{self._log.fileno()}") as file:
            return file.read()

    def kill(self) -> None:
        """`kill -9`, and no return before it is gone."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        self._log.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
