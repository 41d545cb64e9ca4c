"""Shared memory that clients of this host have handed over: whose it is, and reading and writing it safely.

A client may write into it, or take its pages away, at any time. What is read is copied first, and checked
afterwards. It is mapped for writing, which is twice as fast as system calls. It can be, because its size is
sealed and its pages are ordinary ones: those that were taken away come back empty.
"""

import asyncio
import ctypes
import fcntl
import itertools
import logging
import mmap
import os
import secrets
import socket
import weakref
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from tq_store.errors import ConfigError
from tq_store.rpc.segment import HANDLE_BYTES, MAX_SEGMENT_BYTES, required_seals
from tq_store.runs import runs_of
from tq_store.server.pipe import readable

logger = logging.getLogger(__name__)

_HELLO_S = 2.0
_WAITING = 16
"""Clients that may be on their way to a segment while all are taken."""
_REST_S = 0.1
"""Before the next client is let in, when files or memory ran out."""
_INLINE_BYTES = 256 << 10
"""Copying more than this would hold up the event loop, so a thread does it."""
_BYTES_A_THREAD = 2 << 20
_MOST_THREADS = max(1, min(4, len(os.sched_getaffinity(0)) // 2)) if hasattr(os, "sched_getaffinity") else 1
"""That copy for one call; where there are few processors, the others are better used by others."""

P = TypeVar("P")
T = TypeVar("T")


class Segment:
    """A client's memory, as the server sees it. It is let go of when nothing refers to it, no copy either."""

    def __init__(self, fd: int) -> None:
        """Take the descriptor over.

        Raises:
            ValueError: It is not memory of a fixed size within the bounds.
            OSError: It may not be written.
        """
        try:
            self.num_bytes = os.fstat(fd).st_size
            is_sealed = _seals(fd) & required_seals() == required_seals()
            if not is_sealed or not 0 < self.num_bytes <= MAX_SEGMENT_BYTES:
                raise ValueError(f"what came is not a sealed memfd of 1 to {MAX_SEGMENT_BYTES} bytes")
            # huge pages may run out, and to touch one that is not there would end the process
            if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
                raise ValueError(f"what came is not memory in pages of {mmap.PAGESIZE} bytes")
            self._map = mmap.mmap(fd, self.num_bytes)
        except (OSError, ValueError):
            os.close(fd)
            raise
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    async def read(self, offset: int, sizes_bytes: Sequence[int]) -> list[bytes]:
        """Copies of bytes that lie one after the other.

        Raises:
            ValueError: They do not lie within the segment.
        """
        self._check(offset, sum(sizes_bytes))
        starts = itertools.accumulate(sizes_bytes, initial=offset)
        places = list(zip(sizes_bytes, starts, strict=False))
        copies = await _in_threads(self._read, places, sizes_bytes)
        return [piece for pieces in copies for piece in pieces]

    async def write(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Put bytes there, one after the other.

        Raises:
            ValueError: They do not fit.
        """
        sizes_bytes = [len(piece) for piece in pieces]
        self._check(offset, sum(sizes_bytes))
        starts = itertools.accumulate(sizes_bytes, initial=self._address + offset)
        await _in_threads(self._write, list(zip(starts, pieces, sizes_bytes, strict=False)), sizes_bytes)

    def _read(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        return [os.pread(self._fd, *place) for place in places]

    def _write(self, copies: Sequence[tuple[int, bytes, int]]) -> None:
        """Copy bytes to addresses, without the interpreter's lock. Whoever runs it keeps memory mapped."""
        for copy in copies:
            ctypes.memmove(*copy)

    def _check(self, offset: int, num_bytes: int) -> None:
        if not 0 <= offset <= offset + num_bytes <= self.num_bytes:
            raise ValueError(
                f"bytes {offset} to {offset + num_bytes} lie outside a segment of {self.num_bytes}"
            )


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0  # not a memfd


async def _in_threads(
    copy: Callable[[Sequence[P]], T], places: Sequence[P], sizes_bytes: Sequence[int]
) -> list[T]:
    """Copy in threads, unless that takes longer than copying; what each part of the places gave.

    A caller that is cancelled waits for the end: until then the memory is being written.
    """
    num_bytes = sum(sizes_bytes)
    if num_bytes <= _INLINE_BYTES:
        return [copy(places)]
    # a run ends before the piece that would pass the limit, so with room for one more there are no more runs
    a_thread_bytes = max(_BYTES_A_THREAD, -(-num_bytes // _MOST_THREADS)) + max(sizes_bytes)
    loop = asyncio.get_running_loop()
    parts = runs_of(list(zip(places, sizes_bytes, strict=True)), itemgetter(1), most_bytes=a_thread_bytes)
    copying = [loop.run_in_executor(None, copy, [place for place, _ in part]) for part in parts]
    try:
        await asyncio.wait(copying)
    except asyncio.CancelledError:
        await asyncio.wait(copying)
        raise
    return [part.result() for part in copying]


async def _receive_fd(connection: socket.socket) -> int:
    """The descriptor that comes with the first byte.

    Raises:
        ValueError: None came, or several.
        OSError: The connection failed.
    """
    connection.setblocking(False)
    await readable(connection)
    # room for two, so that a second one is seen and closed
    _, fds, _, _ = socket.recv_fds(connection, 1, 2)
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ValueError(f"{len(fds)} descriptors came, not one")
    return fds[0]


class Segments:
    """The segments of all clients, and the Unix socket on which they are handed over.

    Bound to one event loop. A segment goes when its client closes the connection that brought it, or dies.

    Args:
        path: Of the socket.
        limit: Segments at once; who comes beyond it is turned away.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._segments: dict[bytes, Segment] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._file: tuple[int, int] | None = None

    def listen(self) -> None:
        """Open the socket. Whoever serves on the address beside it owns it: what else is there is removed.

        Raises:
            ConfigError: It cannot be had.
        """
        try:
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            self._file = _identity(self._path)
            self._listener.listen()
        except OSError as error:
            raise ConfigError(
                f"cannot take shared memory on {self._path}: {error.strerror or error}"
            ) from error
        self._listener.setblocking(False)
        self._begin(self._accept())

    def __len__(self) -> int:
        return len(self._segments)

    def find(self, handle: bytes) -> Segment:
        """The segment that a call names.

        Raises:
            ValueError: There is none; its client is no longer connected, or never was.
        """
        try:
            return self._segments[handle]
        except KeyError:
            raise ValueError("no such segment; hand it over again") from None

    async def close(self) -> None:
        """Turn everybody away. A socket that another server has opened here since stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # before the listener is closed: until then no other file can have its number
        if self._file is not None and self._file == _identity(self._path):
            self._path.unlink(missing_ok=True)
        self._listener.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError as error:
                logger.warning("a client that wants to share memory cannot be let in: %s", error)
                await asyncio.sleep(_REST_S)
                continue
            if len(self._tasks) > self._limit + _WAITING:
                connection.close()
                continue
            serving = self._begin(self._serve(connection))
            # not in the task, as one that is cancelled before it starts does nothing at all
            serving.add_done_callback(partial(_close, connection))

    async def _serve(self, connection: socket.socket) -> None:
        """Take one client's segment, and keep it until the client has gone."""
        loop, handle = asyncio.get_running_loop(), secrets.token_bytes(HANDLE_BYTES)
        try:
            async with asyncio.timeout(_HELLO_S):
                segment = Segment(await _receive_fd(connection))
        except (OSError, ValueError) as error:
            logger.warning("a client's shared memory is not taken: %s", error or "it did not come in time")
            return
        if len(self._segments) >= self._limit:
            logger.warning("a client's shared memory is not taken: there are %d pieces", self._limit)
            return
        self._segments[handle] = segment
        try:
            await loop.sock_sendall(connection, handle)
            await loop.sock_recv(connection, 1)
        except OSError:
            return
        finally:
            del self._segments[handle]


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path stands for; None for none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _close(connection: socket.socket, _: object) -> None:
    connection.close()
