"""Memory that a client shares with a server of its host: made, handed over, filled and read by the client.

How it is handed over is part of the wire contract and stands in `block_store.proto`.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tq_store.block import Buffer
from tq_store.config import split_address

HANDLE_BYTES = 16
"""What names a segment in calls; whoever knows it may have it filled or read."""
SOCKET_SUFFIX = ".memory"
MAX_SEGMENT_BYTES = 1 << 30
_OPEN_TIMEOUT_S = 2.0
_LEAST_S = 0.001
"""A timeout of 0 would mean not to wait for a socket at all."""
_REST_S = 5.0
_MOST_TRANSFERS = 8
_MOST_SEGMENTS = 2 * _MOST_TRANSFERS
_MOST_PIECES = os.sysconf("SC_IOV_MAX")
"""Places that one system call copies from or to."""
_SEALS = ("F_SEAL_GROW", "F_SEAL_SHRINK", "F_SEAL_SEAL")


def required_seals() -> int:
    """The seals of a segment: it can neither grow nor shrink, and that cannot be changed."""
    seals: int = sum(getattr(fcntl, name) for name in _SEALS)
    return seals


class Segment:
    """One piece of shared memory, handed over when it is made. One thread at a time may use it.

    It lives as long as one of the two processes holds it: nothing is left behind when they die.

    Args:
        path: The server's socket for it.
        num_bytes: 1 byte to 1 GiB.
        timeout_s: Longest time to wait for the server.

    Raises:
        OSError: There is no such server, it takes no segments, or there is no memory.
    """

    def __init__(self, path: str, num_bytes: int, *, timeout_s: float = _OPEN_TIMEOUT_S) -> None:
        self.num_bytes = num_bytes
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as undo:
            fd = os.memfd_create("tq-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, fd)
            os.posix_fallocate(fd, 0, num_bytes)  # fails here, not in the middle of a transfer
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, required_seals())
            self._map = undo.enter_context(mmap.mmap(fd, num_bytes))
            self._socket = undo.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(max(timeout_s, _LEAST_S))
            self._socket.connect(path)
            socket.send_fds(self._socket, [b"\0"], [fd])
            self._socket.settimeout(max(deadline - time.monotonic(), _LEAST_S))
            self.handle = self._socket.recv(HANDLE_BYTES, socket.MSG_WAITALL)
            if len(self.handle) != HANDLE_BYTES:
                raise ConnectionRefusedError("the server takes no shared memory now")
            self._socket.setblocking(False)
            self._file = os.fdopen(fd, "r+b", buffering=0)
            undo.pop_all()

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        self._map[offset : offset + len(data)] = data

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Copy bytes out."""
        return self._map[offset : offset + num_bytes]

    @contextlib.contextmanager
    def view(self) -> Iterator[memoryview]:
        """The bytes where they lie, until the context is left; slices of it must be gone by then."""
        with memoryview(self._map) as view:
            yield view

    def write_from(self, offset: int, pieces: Sequence[Buffer]) -> None:
        """Copy bytes in from several places, by as few system calls as there can be.

        The interpreter's lock is let go of once a call: where another thread never rests, each time costs a
        switch interval. So this is for many pieces, and `write` for one.

        Raises:
            OSError: The kernel did not copy all.
        """
        self._copy(os.pwritev, offset, pieces)

    def read_into(self, offset: int, pieces: Sequence[Buffer]) -> None:
        """Copy bytes out into several places, as `write_from` copies them in.

        Raises:
            OSError: The kernel did not copy all.
        """
        self._copy(os.preadv, offset, pieces)

    def _copy(self, copy: Callable[[int, Any, int], int], offset: int, pieces: Sequence[Buffer]) -> None:
        for start in range(0, len(pieces), _MOST_PIECES):
            run = pieces[start : start + _MOST_PIECES]
            num_bytes = sum(map(len, run))
            if copy(self._file.fileno(), run, offset) != num_bytes:
                raise OSError(f"{num_bytes} bytes at {offset} of shared memory could not be copied")
            offset += num_bytes

    @property
    def is_alive(self) -> bool:
        """Whether the server still holds it, as far as this side knows."""
        try:
            return bool(self._socket.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Give it up on both sides."""
        self._socket.close()
        with contextlib.suppress(BufferError):  # a view that an exception holds; it goes with that
            self._map.close()
        self._file.close()


class SegmentPool:
    """Segments for the threads of one client, made when they are needed, for at most eight transfers.

    A transfer may have a second one, so that the server fills it while the first is read. There are at most
    sixteen, those counted that the server may still write for a transfer that has left. Where there are none
    to be had, their user goes the ordinary way. A server that gave none is asked again after five seconds.

    Args:
        address: ``unix:path``, or any other address, which has none.
        segment_bytes: Bytes of each; 0 for none.
    """

    def __init__(self, address: str, segment_bytes: int) -> None:
        path, port = split_address(address)
        is_possible = port is None and segment_bytes > 0 and hasattr(os, "memfd_create")
        self._path = path + SOCKET_SUFFIX if is_possible else None
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._idle: list[Segment] = []
        self._num_transfers = 0
        self._num_taken = 0
        self._rests_until = 0.0
        self._is_closed = False

    @contextlib.contextmanager
    def lend(self, timeout_s: float) -> Iterator[Segment | None]:
        """A segment for the time of one transfer, or None. One whose transfer fails is given up.

        Args:
            timeout_s: What the transfer has left; making a segment takes half of it at most.
        """
        with self.transfer() as is_let_in:
            segment = self.take(timeout_s) if is_let_in else None
            if segment is None:
                yield None
                return
            is_sound = False
            try:
                yield segment
                is_sound = True
            except GeneratorExit:
                is_sound = True  # a reader that stops early, between two calls
                raise
            finally:
                self.put_back(segment, is_sound=is_sound)

    @contextlib.contextmanager
    def transfer(self) -> Iterator[bool]:
        """Whether there is room for another transfer; meanwhile it counts as one."""
        with self._lock:
            is_let_in = self._num_transfers < _MOST_TRANSFERS
            self._num_transfers += is_let_in
        try:
            yield is_let_in
        finally:
            with self._lock:
                self._num_transfers -= is_let_in

    def close(self) -> None:
        """Give all segments up, those that are lent when they come back."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for segment in idle:
            segment.close()

    def take(self, timeout_s: float) -> Segment | None:
        """A segment, for a transfer that was let in and has so much time left; to be put back."""
        with self._lock:
            if self._path is None or self._is_closed:
                return None
            while self._idle:
                segment = self._idle.pop()
                if segment.is_alive:
                    self._num_taken += 1
                    return segment
                segment.close()  # of a server that has ended
            if self._num_taken >= _MOST_SEGMENTS or time.monotonic() < self._rests_until:
                return None
            self._num_taken += 1
        try:
            timeout_s = min(_OPEN_TIMEOUT_S, timeout_s / 2)
            return Segment(self._path, self._segment_bytes, timeout_s=timeout_s)
        except OSError:
            with self._lock:
                self._num_taken -= 1
                self._rests_until = time.monotonic() + _REST_S
            return None

    def put_back(self, segment: Segment, *, is_sound: bool) -> None:
        """Take a segment back; one that the server may still write is none that is sound, and given up."""
        with self._lock:
            self._num_taken -= 1
            is_kept = is_sound and not self._is_closed
            if is_kept:
                self._idle.append(segment)
        if not is_kept:
            segment.close()
