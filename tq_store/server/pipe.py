"""One client's connection for block bytes, as the server writes to it; it waits on the event loop alone."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from functools import partial
from typing import TypeVar

from tq_store.server.tenants import Tenant

_INLINE_BYTES = 256 << 10
"""For less than this a thread is not worth waking."""
Patience = Callable[[], AbstractAsyncContextManager[None]]
T = TypeVar("T")


class Pipe:
    """A client's connection, as the server sees it. Written by one call at a time.

    Args:
        connection: Not blocking; owned by whoever makes the pipe.
        tenant: Whose it is.
        threads: To write from; None for the event loop.
    """

    def __init__(self, connection: socket.socket, tenant: Tenant, threads: Executor | None) -> None:
        self.tenant = tenant.name
        self.is_lent = False
        self.num_calls = 0
        self.has_gone = asyncio.Event()
        self.is_free = asyncio.Event()
        self.is_free.set()
        self._connection = connection
        self._threads = threads

    async def write(self, pieces: Sequence[memoryview], patience: Patience = nullcontext) -> None:
        """Send bytes, as fast as the client takes them.

        Args:
            pieces: A mebibyte or so.
            patience: In its context they go, from the first wait for the client on until all are sent.

        Raises:
            ValueError: The client has closed the pipe.
            TimeoutError: It ran out.
        """
        threads = self._threads if sum(map(len, pieces)) > _INLINE_BYTES else None
        if isinstance(self._connection, ssl.SSLSocket):
            pieces, threads = [memoryview(b"".join(pieces))], self._threads
        is_waiting = False
        try:
            async with AsyncExitStack() as waiting:
                while pieces:
                    try:
                        num_bytes = await run(threads, partial(self._send, pieces))
                    except (BlockingIOError, ssl.SSLWantWriteError):
                        if not is_waiting:
                            await waiting.enter_async_context(patience())
                            is_waiting = True
                        await writable(self._connection)
                    else:
                        pieces = _after(pieces, num_bytes)
        except TimeoutError:
            raise
        except OSError as error:
            raise ValueError("the client has closed the pipe") from error

    def _send(self, pieces: Sequence[memoryview]) -> int:
        """What there is room for; of what is encrypted all, or the same again later."""
        if isinstance(self._connection, ssl.SSLSocket):
            return self._connection.send(pieces[0])
        return self._connection.sendmsg(pieces)


async def run(threads: Executor | None, operation: Callable[[], T]) -> T:
    """Do what does not wait, in a thread if there is one; a caller that is cancelled waits for its end."""
    if threads is None:
        return operation()
    doing = asyncio.get_running_loop().run_in_executor(threads, operation)
    try:
        await asyncio.wait([doing])
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise
    return doing.result()


async def readable(connection: socket.socket) -> None:
    """Wait until there is something to read, or the end."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(connection)


async def writable(connection: socket.socket) -> None:
    """Wait until there is room to write, or nobody to read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(connection)


def _after(pieces: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of pieces after so many bytes."""
    left: list[memoryview] = []
    for piece in pieces:
        if num_bytes < len(piece):
            left.append(piece[num_bytes:])
        num_bytes = max(0, num_bytes - len(piece))
    return left
