"""A real Redis or Valkey server of our own, and a proxy that can hold, cut and count what passes."""

import asyncio
import contextlib
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO

import pytest


class RedisProcess:
    """A server in a directory of its own; nothing is saved to disk.

    Listens on a unix socket, or on a port of the loopback address if one is given; with a directory of
    certificates, by TLS alone, with its replicas and the rest of its cluster too.
    """

    def __init__(
        self, directory: Path, *options: str, port: int | None = None, certificates: Path | None = None
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "redis.sock"
        self.port = port
        self.url = f"unix://{self.socket}" if port is None else f"redis://127.0.0.1:{port}"
        self._how_to_reach = ["-s", str(self.socket)] if port is None else ["-p", str(port)]
        self._command = [server_binary(), "--dir", str(directory), "--bind", "127.0.0.1"]
        self._command += ["--port", str(port or 0), *(() if port else ("--unixsocket", str(self.socket)))]
        if certificates is not None:
            ca, *pairs = ("ca.pem", "client.pem", "client.key", "server.pem", "server.key")
            client_cert, client_key, cert, key = (str(certificates / name) for name in pairs)
            authority = str(certificates / ca)
            self._how_to_reach += ["--tls", "--cacert", authority, "--cert", client_cert, "--key", client_key]
            self._command += ["--port", "0", "--tls-port", str(port), "--tls-ca-cert-file", authority]
            self._command += ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-replication", "yes"]
        self._command += ["--save", "", "--appendonly", "no", *options]
        self.start()

    def start(self) -> None:
        self._process = started(self._command)

    def kill(self) -> None:
        stop(self._process)
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        """Let it neither answer nor die."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def command(self, *arguments: str) -> str:
        """What the server's own client prints for a command."""
        return cli(*self._how_to_reach, *arguments)


def cli(*arguments: str) -> str:
    """What the client that comes with the server prints."""
    client = shutil.which("redis-cli") or shutil.which("valkey-cli")
    assert client is not None, "the server's packages bring its client"
    command = [client, "--no-auth-warning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def server_binary() -> str:
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.fail("no redis-server or valkey-server on the PATH; type: apt-get install redis-server")
    return binary


def started(command: list[str]) -> "subprocess.Popen[bytes]":
    """Start a server and wait until it says that it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = b""
    for line in process.stdout:
        output += line
        if re.search(rb"eady to accept connections|now ready to accept|Sentinel ID is", line):
            # what it says later must not fill the pipe
            threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
            return process
    pytest.fail(f"the redis server did not start: {output.decode(errors='replace')}")


def _drain(output: IO[bytes]) -> None:
    with output:
        for _ in output:
            pass


def stop(process: "subprocess.Popen[bytes]") -> None:
    """As `kill -9` does."""
    process.kill()
    process.wait()


class Proxy:
    """Stands between a backend and a server, on a unix socket.

    `open_gate` cleared holds replies back; `cut_after` ends the connection in the middle of a reply;
    `pause_s` passes before each 64 KiB of replies. `bursts` are the bytes of each direction, merged until the
    other side speaks.
    """

    def __init__(self, server: RedisProcess, directory: Path) -> None:
        self._server = server
        self.socket = directory / "proxy.sock"
        self.url = f"unix://{self.socket}"
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.requested = asyncio.Event()
        self.cut_after: int | None = None
        self.pause_s = 0.0
        self.bursts: list[tuple[str, bytearray]] = []

    async def __aenter__(self) -> "Proxy":
        self._connections: set[asyncio.Task[None]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._listener = await asyncio.start_unix_server(self._serve, self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        while self._connections:
            for pump in self._pumps:
                pump.cancel()
            await asyncio.wait(self._connections, timeout=0.1)
        await self._listener.wait_closed()

    def requests(self) -> list[bytes]:
        return [bytes(data) for direction, data in self.bursts if direction == "request"]

    def replies(self) -> list[bytes]:
        return [bytes(data) for direction, data in self.bursts if direction == "reply"]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        below_reader, below_writer = await asyncio.open_unix_connection(self._server.socket)
        pumps = {
            asyncio.create_task(self._pump("request", reader, below_writer)),
            asyncio.create_task(self._pump("reply", below_reader, writer)),
        }
        self._pumps |= pumps
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._pumps -= pumps
        for end in (writer, below_writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()
        self._connections.discard(task)

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if direction == "request":
                self.requested.set()
            else:
                await self.open_gate.wait()
                await asyncio.sleep(self.pause_s)
                if self.cut_after is not None:
                    writer.write(data[: self.cut_after])
                    await writer.drain()
                    return
            if not self.bursts or self.bursts[-1][0] != direction:
                self.bursts.append((direction, bytearray()))
            self.bursts[-1][1].extend(data)
            writer.write(data)
            await writer.drain()
