"""The processes of a store benchmark: servers of ours, a Redis, and workers that load them."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.plugins import plugin_path
from benchmarks.store_load import Command

ROOT = Path(__file__).parents[1]
_PATH = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
_ENVIRONMENT = dict(os.environ, PYTHONPATH=os.pathsep.join(_PATH))
_START_S = 20.0
_AHEAD_S = 0.2
"""How far ahead a start is agreed on; clients that connect more slowly start late, and end late too."""


class BenchmarkError(RuntimeError):
    """Something without which there is no number; the message says what to do."""


class Workers:
    """Processes that run `store_load`; use as a context."""

    def __init__(self, count: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.store_load"],
                cwd=ROOT,
                env=_ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]

    def run(self, command: Command) -> dict[str, Any]:
        """Spread a command's clients over the processes; answers are joined.

        Raises:
            BenchmarkError: A worker could not do it.
        """
        command = replace(command, start_at=time.monotonic() + _AHEAD_S)
        asked = []
        for number, process in enumerate(self._processes):
            share = command.clients[number :: len(self._processes)]
            if share:
                assert process.stdin is not None
                process.stdin.write(json.dumps(asdict(replace(command, clients=share))) + "\n")
                process.stdin.flush()
                asked.append(process)
        answers = [json.loads(process.stdout.readline()) for process in asked if process.stdout is not None]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise BenchmarkError(f"{command.op} at {command.address}: {errors[0]}")
        return {
            "bytes": sum(answer["bytes"] for answer in answers),
            "elapsed_s": max(answer["elapsed_s"] for answer in answers),
            "cpu_s": sum(answer["cpu_s"] for answer in answers),
            "times_ms": sorted(time_ms for answer in answers for time_ms in answer["times_ms"]),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with process:
                assert process.stdin is not None
                process.stdin.close()


class TqStore:
    """A server of ours in a process of its own, on loopback and on a Unix socket; use as a context."""

    def __init__(self, directory: Path, *options: str) -> None:
        path = directory / "tq.sock"
        self.local_address = f"unix:{path}"
        payload_port = free_port()
        command = [sys.executable, "-m", "tq_store", "serve", "--listen", "127.0.0.1:0"]
        command += ["--payload-port", str(payload_port)]
        said = directory / "tq-store.log"
        with said.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own server
                [*command, "--local-socket", str(path), *options],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": plugin_path(Path(tempfile.mkdtemp(dir=directory)))},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "serves on " not in line:
            self.__exit__()
            why = said.read_text(errors="replace").strip().splitlines()[-1:] or [line.strip()]
            raise BenchmarkError(f"tq-store did not start: {why[0]}; try: {' '.join([*command, *options])}")
        self.address = line.split("serves on ")[1].split(",")[0].strip()
        self.ports = (int(self.address.rpartition(":")[2]), payload_port)

    def cpu_s(self) -> float:
        """Processor time that the process has taken."""
        fields = (
            Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_resident_bytes(self) -> int:
        """The most memory that the process has had at once."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_START_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[int]:
    """A Redis or Valkey server that keeps nothing, on a free port of loopback; gives the port.

    Raises:
        BenchmarkError: There is none.
    """
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise BenchmarkError("there is no redis-server; type: apt-get install redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(  # noqa: S603 - found on the PATH
        [binary, *options, "--dir", str(directory)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(_START_S)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"nobody listens on port {port} after {_START_S:g} s") from None
            time.sleep(0.02)
        else:
            return


def output_of(command: Sequence[str], *, timeout_s: float = 300.0) -> str:
    """What a program prints.

    Raises:
        BenchmarkError: It fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[:3])}…: {done.stderr.strip()[-300:]}")
    return done.stdout
