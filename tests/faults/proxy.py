"""A TCP proxy in user space that does to one stream of bytes what broken networks do."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

_READ_BYTES = 1 << 16
_MATURE_S = 0.02
"""How long bytes that a fault needs are waited for; then it does with those that are there."""


class Kind(Enum):
    """What happens at one place of a stream."""

    CUT = "the connection ends there, in order"
    RESET = "the connection ends there with a reset"
    LOSS = "bytes are left out"
    DUPLICATE = "bytes come twice"
    REORDER = "bytes come after those that follow them"
    FLIP = "one bit is flipped"
    STALL = "nothing more comes for a while"
    FREEZE = "nothing more comes, and the connection stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of one connection.

    Args:
        is_downward: In the stream from the server to the client.
        position: After so many bytes of that stream.
        num_bytes: How many bytes it concerns, where that means something.
        seconds: How long a stall lasts.
        connections: How many are struck, the first that come so far; None for all.
    """

    kind: Kind
    is_downward: bool
    position: int
    num_bytes: int = 1
    seconds: float = 0.0
    connections: int | None = None


class Proxy:
    """Listens, by default on a port of its own, passes on what comes, and strikes every connection once.

    Runs on a thread of its own; made by `proxied`. `passed` are the bytes of both directions so far, upward
    first, `struck` how often the fault came about, and `struck_port` the client's port of the last time.

    Args:
        upstream: ``host:port`` or ``unix:path``.
        fault: None passes everything on as it is.
        listen: ``host:port``.
    """

    def __init__(self, upstream: str, fault: Fault | None, listen: str) -> None:
        self._upstream = upstream
        self._listen = listen
        self._fault = fault
        self.address = ""
        self.passed = [0, 0]
        self.struck = self.struck_port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the port."""
        host, port = self._listen.split(":")
        self._listener = await asyncio.start_server(self._connect, host, int(port))
        self.address = f"{host}:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Cut everything."""
        self._listener.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # cancelled by `stop` alone, and asyncio's streams complain of handlers that were cancelled
        with contextlib.suppress(asyncio.CancelledError, OSError):
            above_reader, above_writer = await self._open_upstream()
            try:
                await self._pass_on(reader, above_writer, above_reader, writer)
            finally:
                above_writer.transport.abort()
        writer.transport.abort()

    async def _open_upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._upstream.rsplit(":", 1)
        if host == "unix":
            return await asyncio.open_unix_connection(port)
        return await asyncio.open_connection(host, port)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        above_writer: asyncio.StreamWriter,
        above_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            async with asyncio.TaskGroup() as pumps:
                port = writer.get_extra_info("peername")[1]
                pumps.create_task(self._pump(reader, above_writer, port, is_downward=False))
                pumps.create_task(self._pump(above_reader, writer, port, is_downward=True))
        except* (_Ended, OSError):
            pass

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, *, is_downward: bool
    ) -> None:
        fault = self._fault if self._fault and self._fault.is_downward is is_downward else None
        position = 0
        while data := await reader.read(_READ_BYTES):
            self.passed[is_downward] += len(data)
            if fault and position + len(data) > fault.position and self.struck != fault.connections:
                before = data[: fault.position - position]
                writer.write(before)
                await writer.drain()
                self.struck, self.struck_port = self.struck + 1, port
                await self._strike(fault, data[len(before) :], reader, writer)
                fault = None
            else:
                writer.write(data)
            position += len(data)
            await writer.drain()
        # an end in one direction is the end: grpc has no half-closed connections
        raise _Ended

    async def _strike(
        self, fault: Fault, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        size = fault.num_bytes
        if fault.kind is Kind.CUT:
            writer.close()
            raise _Ended
        if fault.kind is Kind.RESET:
            endpoint = writer.get_extra_info("socket")
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise _Ended
        if fault.kind is Kind.FREEZE:
            await asyncio.Event().wait()
        if fault.kind is Kind.STALL:
            await asyncio.sleep(fault.seconds)
        elif fault.kind is Kind.FLIP:
            data = bytes([data[0] ^ 1 << fault.position % 8]) + data[1:]
        elif fault.kind is Kind.LOSS:
            data = data[size:]
        elif fault.kind is Kind.DUPLICATE:
            data = data[:size] + data
        elif fault.kind is Kind.REORDER:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MATURE_S):
                    while len(data) < 2 * size and (more := await reader.read(2 * size - len(data))):
                        self.passed[fault.is_downward] += len(more)
                        data += more
            size = min(size, len(data) // 2)
            data = data[size : 2 * size] + data[:size] + data[2 * size :]
        writer.write(data)


class _Ended(Exception):
    """A connection is over."""


@contextmanager
def proxied(upstream: str, fault: Fault | None, *, listen: str = "127.0.0.1:0") -> Iterator[Proxy]:
    """A running proxy."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(call: Callable[[], Awaitable[None]]) -> None:
        asyncio.run_coroutine_threadsafe(call(), loop).result(20)

    proxy = Proxy(upstream, fault, listen)
    try:
        run(proxy.start)
        try:
            yield proxy
        finally:
            run(proxy.stop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def random_fault(rng: random.Random, kind: Kind, *, upward_bytes: int, downward_bytes: int) -> Fault:
    """A fault somewhere in streams of about these lengths; as often near the start as anywhere else."""
    is_downward = rng.random() < 0.5
    stream_bytes = downward_bytes if is_downward else upward_bytes
    position = rng.randrange(stream_bytes)
    if rng.random() < 0.5:
        position = int(stream_bytes ** rng.random())
    return Fault(
        kind=kind,
        is_downward=is_downward,
        position=position,
        num_bytes=rng.choice([1, 2, 9, 17, 64, 1000, 20_000]),
        seconds=rng.uniform(0.05, 0.8),
    )
