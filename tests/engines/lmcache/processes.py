"""Processes that the tests talk to: LMCache's multi-process server, and a Redis on a port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

WAIT_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class LMCacheServer:
    """A server with these L2 adapters. Started again it has nothing but what they hold."""

    def __init__(
        self,
        directory: Path,
        transport: str,
        *adapters: dict[str, Any],
        chunk_tokens: int = 256,
        more: Sequence[str] = (),
    ) -> None:
        self._log = directory / "lmcache.log"
        self._command = [sys.executable, "-m", "lmcache.v1.multiprocess.server"]
        self._command += ["--transport", transport, "--chunk-size", str(chunk_tokens)]
        self._command += ["--supported-transfer-mode", "auto"]
        self._command += ["--no-l1-use-lazy", "--l1-size-gb", "0.25", "--eviction-policy", "LRU"]
        self._command += ["--disable-observability", *more]
        for adapter in adapters:
            self._command += ["--l2-adapter", json.dumps(adapter)]
        self._scheme = {"grpc": "grpc", "zmq": "tcp"}[transport]
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self) -> subprocess.Popen[bytes]:
        port = free_port()
        self.url = f"{self._scheme}://127.0.0.1:{port}"
        name = f"tq_test_{os.getpid()}_{port}"
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self._command, "--port", str(port), "--shm-name", name],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"},
            )

    def fails_to_start(self) -> bool:
        """Whether the process ends by itself, with a failure."""
        self._process = self._launch()
        try:
            return self._process.wait(WAIT_S) != 0
        finally:
            self.stop()

    def start(self) -> "LMCacheServer":
        self._process = self._launch()
        client = RequestClientFactory.create(self.url)
        try:
            if not client.ping(None).result(timeout=WAIT_S):
                pytest.fail(f"LMCache does not answer:\n{self.log()}")
        except Exception as error:
            self.stop()
            pytest.fail(f"LMCache did not start ({error}):\n{self.log()}")
        finally:
            client.close()
        return self

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> "LMCacheServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisServer:
    """A Redis on a port of the loopback, because LMCache's own client takes no socket path."""

    def __init__(self, directory: Path) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            pytest.fail("no redis-server or valkey-server on the PATH; type: apt-get install redis-server")
        self.port = free_port()
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        self._process = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"eady to accept connections" in line:
                return
        pytest.fail("the redis server did not start")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
