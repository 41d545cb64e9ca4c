"""TCP connections beside grpc for block bytes, as a client has them: opened, kept, lent to one get at a time.

grpc's Python copies what it moves under the interpreter's lock; a socket is read without it, straight into
the block's own bytes. How a pipe is opened is part of the wire contract and stands in `block_store.proto`.
"""

import contextlib
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from io import BytesIO

from tq_store.config import ClientConfig, split_address
from tq_store.errors import RpcDenied, RpcError, RpcOverLimit, RpcUnavailable
from tq_store.rpc import convert
from tq_store.rpc.connection import Connection
from tq_store.rpc.limits import PIPE_NAME_BYTES
from tq_store.rpc.parcels import PARCEL_HEADER_BYTES, parse_parcel_header

_OPEN_TIMEOUT_S = 1.0
_BUSY_REST_S = 5.0
_REST_S = 60.0
_RECORD_BYTES = 16 << 10
"""As much as TLS hands out at once."""
_LEAST_S = 0.001
_TIMEVAL = struct.Struct("ll")


class Pipe:
    """One connection. One thread at a time reads from it, in turn with the server's writing.

    Args:
        host: Of the server.
        port: That the server named.
        ticket: That the server gave.
        context: For TLS; None for none.
        timeout_s: Longest time until it is open.

    Raises:
        OSError: Nobody answers there in time, or it is not the server.
    """

    def __init__(
        self, host: str, port: int, ticket: bytes, *, context: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self.is_clean = True
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(socket.create_connection((host, port), timeout_s))
            self._socket.settimeout(_left_s(deadline))
            self._is_encrypted = context is not None
            if context is not None:
                self._socket = undo.enter_context(context.wrap_socket(self._socket, server_hostname=host))
            self._socket.sendall(ticket)
            self._socket.settimeout(None)
            try:
                self.name = self._receive(PIPE_NAME_BYTES, deadline)
            except EOFError:
                raise ConnectionRefusedError("the server takes no such ticket") from None
            undo.pop_all()

    def begin(self) -> int:
        """A number for a call that is going to write here. The pipe is of no use to others until `end`."""
        self.is_clean = False
        return secrets.randbits(64)

    def end(self) -> None:
        """All that the call wrote was read."""
        self.is_clean = True

    def receive_block(self, call: int, index: int, timeout_s: float) -> bytes | None:
        """The next block, None for a missing one.

        Args:
            call: Its number.
            index: The block's position among the keys of the call.
            timeout_s: Longest time for all of it.

        Raises:
            EOFError: The server has closed the pipe.
            OSError: It failed, or took too long.
            ValueError: What came is something else.
        """
        deadline = time.monotonic() + timeout_s
        header = self._receive(PARCEL_HEADER_BYTES, deadline)
        num_bytes = parse_parcel_header(header, call=call, index=index)
        return self._receive(num_bytes, deadline) if num_bytes else None

    @property
    def is_alive(self) -> bool:
        """Whether the server still holds it, as far as this side knows. Nothing comes unless asked for."""
        try:
            # past TLS, which has no such flags
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def shut(self) -> None:
        """End it, from any thread: whoever reads finds the end."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # past TLS, which is not for two threads

    def close(self) -> None:
        """Give it up."""
        self._socket.close()

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        """So many bytes, without a copy where the kernel hands them out at once."""
        data = self._take(num_bytes, deadline)
        if len(data) == num_bytes:
            return data
        whole = BytesIO()
        while True:
            whole.write(data)
            missing_bytes = num_bytes - whole.tell()
            if not missing_bytes:
                return whole.getvalue()
            data = self._take(missing_bytes, deadline)

    def _take(self, num_bytes: int, deadline: float) -> bytes:
        left_s = _left_s(deadline)
        if self._is_encrypted:
            data = self._take_record(num_bytes, left_s)
        else:
            # the kernel keeps the time: with a timeout of Python's, it would not wait for all
            seconds, part = divmod(left_s, 1)
            packed = _TIMEVAL.pack(int(seconds), int(part * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
            data = self._socket.recv(num_bytes, socket.MSG_WAITALL)
        if not data:
            raise EOFError("the server has closed the pipe")
        return data

    def _take_record(self, num_bytes: int, timeout_s: float) -> bytes:
        """Some bytes through TLS, which goes on waiting when the kernel's time is over."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(min(num_bytes, _RECORD_BYTES))
        finally:
            self._socket.settimeout(None)


def _left_s(deadline: float) -> float:
    """Time until a deadline, which to the kernel must not be 0: that would mean to wait for ever.

    Raises:
        TimeoutError: It is over.
    """
    left_s = deadline - time.monotonic()
    if left_s < _LEAST_S:
        raise TimeoutError("the time is over")
    return left_s


class PipePool:
    """Pipes for the threads of one client, opened when they are needed.

    Where there are none to be had, its user goes the ordinary way. A server that gave none, or whose port
    cannot be reached, is asked again after a while.

    Args:
        connection: To ask for pipes.
        config: How many, and TLS.
    """

    def __init__(self, connection: Connection, config: ClientConfig) -> None:
        self._host, port = split_address(connection.address)
        self._connection = connection
        self._most = config.pipes if port is not None else 0
        self._open_timeout_s = min(_OPEN_TIMEOUT_S, config.connect_timeout_s)
        self._config = config
        self._lock = threading.Lock()
        self._idle: list[Pipe] = []
        self._lent: set[Pipe] = set()
        self._num_opening = 0
        self._rests_until = 0.0
        self._is_closed = False

    @contextlib.contextmanager
    def lend(self, timeout_s: float) -> Iterator[Pipe | None]:
        """A pipe for the time of one call, or None. One that a call has begun and not ended is given up.

        Args:
            timeout_s: What the call has left; opening a pipe takes half of it at most.

        Raises:
            RpcUnavailable, RpcDenied, RpcOverLimit: There is none, and a stream would fare no better.
        """
        pipe = self._take(timeout_s)
        try:
            yield pipe
        finally:
            if pipe is not None:
                self._put_back(pipe)

    def close(self) -> None:
        """Give all pipes up; who reads from one finds its end."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for pipe in self._lent:
                pipe.shut()
        for pipe in idle:
            pipe.close()

    def _take(self, timeout_s: float) -> Pipe | None:
        with self._lock:
            while self._idle:
                idle = self._idle.pop()
                if idle.is_alive:
                    self._lent.add(idle)
                    return idle
                idle.close()  # it was idle for long, or its server has ended
            is_enough = len(self._lent) + self._num_opening >= self._most
            if self._is_closed or is_enough or time.monotonic() < self._rests_until:
                return None
            self._num_opening += 1
        pipe: Pipe | None = None
        rest_s = 0.0
        try:
            pipe = self._open(min(self._open_timeout_s, timeout_s / 2))
            rest_s = 0.0 if pipe else _BUSY_REST_S
        except (RpcUnavailable, RpcDenied, RpcOverLimit):
            raise
        except (RpcError, OSError, ValueError):  # the last for a host that is no name to TLS
            rest_s = _REST_S
        finally:
            with self._lock:
                self._num_opening -= 1
                self._rests_until = time.monotonic() + rest_s
                if pipe is not None:
                    self._lent.add(pipe)
        return pipe

    def _open(self, timeout_s: float) -> Pipe | None:
        deadline = time.monotonic() + timeout_s
        port, ticket = self._connection.ask(
            "OpenPipe",
            convert.pack_open_pipe(),
            convert.parse_opened_pipe,
            timeout_s=timeout_s,
            is_idempotent=False,
        )
        if not port:
            return None
        context = _tls_context(self._config)
        return Pipe(self._host, port, ticket, context=context, timeout_s=_left_s(deadline))

    def _put_back(self, pipe: Pipe) -> None:
        with self._lock:
            self._lent.discard(pipe)
            is_kept = pipe.is_clean and not self._is_closed
            if is_kept:
                self._idle.append(pipe)
        if not is_kept:
            pipe.close()


def _tls_context(config: ClientConfig) -> ssl.SSLContext | None:
    """What grpc's channel is given, for a socket; raises OSError where a file is of no use."""
    if not config.uses_tls:
        return None
    context = ssl.create_default_context(cafile=config.tls_ca)
    if config.tls_cert is not None:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    return context
