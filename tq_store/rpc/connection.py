"""A client's way to one server: connections, credentials, deadlines, retries, grpc's exceptions made ours."""

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc

from tq_store.config import ClientConfig, is_local
from tq_store.errors import ConfigError, RpcError, RpcUnavailable, RpcUnknown
from tq_store.rpc.convert import SERVICE_NAME
from tq_store.rpc.lanes import Stop
from tq_store.rpc.status import error_of
from tq_store.rpc.token import METADATA_KEY, TokenFile, bearer
from tq_store.rpc.tracing import Metadata, Tracing
from tq_store.rpc.transport import TRANSPORT_OPTIONS, keep_freed_memory

_KEEPALIVE_MS = 30_000
_MAX_RECONNECT_PAUSE_MS = 2_000

T = TypeVar("T")


class Connection:
    """Carries requests and answers as bytes; what they mean is its user's affair.

    Called from any thread, blocks until the deadline at the latest. Connects with the first call and again
    whenever the connection was lost. With several connections, calls take turns on them.

    Args:
        address: ``host:port`` or ``unix:path``.
        config: Deadlines, retries, number of connections, TLS and token.

    Raises:
        ConfigError: A file is not readable, or a token would travel unencrypted to another machine.
    """

    def __init__(self, address: str, config: ClientConfig) -> None:
        self.address = address
        self._config = config
        self._token = _token_file(address, config)
        self.tracing = Tracing() if config.trace else None
        keep_freed_memory()
        self._channels = [_open_channel(address, config) for _ in range(config.connections)]
        self._turns = itertools.cycle(self._channels)
        self._closed = threading.Event()
        self._counters: Counter[str] = Counter(retries=0, failed_calls=0)
        self._counters_lock = threading.Lock()

    @property
    def num_connections(self) -> int:
        """How many calls can have a connection to themselves."""
        return len(self._channels)

    @property
    def counters(self) -> dict[str, int]:
        """``retries`` made, ``failed_calls`` that ended in an exception, and what users have counted."""
        with self._counters_lock:
            return dict(self._counters)

    def count(self, name: str) -> None:
        """Add one to a counter."""
        with self._counters_lock:
            self._counters[name] += 1

    def attempts(self, timeout_s: float) -> "Attempts":
        """The deadline and the retries of one call that starts now."""
        return Attempts(self._config, timeout_s)

    def ask(
        self,
        method: str,
        request: bytes,
        parse: Callable[[bytes], T],
        *,
        timeout_s: float,
        is_idempotent: bool = True,
    ) -> T:
        """One request, one answer; asked again while the server is unreachable, if that changes nothing.

        Raises:
            RpcError: As its subclasses say; also when `parse` raises ValueError.
        """
        send = next(self._turns).unary_unary(_path(method), None, None)
        attempts = self.attempts(timeout_s)
        while True:
            try:
                with self._translated(method) as metadata:
                    return parse(send(request, timeout=attempts.remaining_s, metadata=metadata))
            except RpcUnavailable as error:
                if not is_idempotent:
                    raise
                self.wait_or_raise(attempts, error)

    def start(
        self, method: str, request: bytes, parse: Callable[[bytes], T], *, timeout_s: float
    ) -> "Pending[T]":
        """One request whose answer is waited for later. It is made once.

        Raises:
            RpcError: The connection is closed, or there is no token.
        """
        send = next(self._turns).unary_unary(_path(method), None, None)
        translated = self._translated(method)
        with contextlib.ExitStack() as undo:
            metadata = undo.enter_context(translated)
            call = send.future(request, timeout=timeout_s, metadata=metadata)
            undo.pop_all()
        return Pending(call, parse, translated)

    def receive(
        self, method: str, request: bytes, *, timeout_s: float, stop: Stop | None = None
    ) -> Generator[bytes, None, None]:
        """One request, a stream of answers. Closing the iterator cancels the call; so does `stop`, quietly.

        Raises:
            RpcError: At any point of the stream.
        """
        stop = stop or Stop()
        start = next(self._turns).unary_stream(_path(method), None, None)
        with self._translated(method) as metadata:
            call = start(request, timeout=timeout_s, metadata=metadata)
            try:
                with stop.ends(call.cancel):
                    yield from call
            except grpc.RpcError:
                if not stop.is_set:
                    raise
            finally:
                _end(call)

    def send(
        self, method: str, requests: Iterator[bytes], parse: Callable[[bytes], T], *, timeout_s: float
    ) -> T:
        """A stream of requests, read from a thread of grpc's as the network takes them; one answer.

        Raises:
            RpcError: As its subclasses say; also when `parse` raises ValueError.
        """
        start = next(self._turns).stream_unary(_path(method), None, None)
        with self._translated(method) as metadata:
            return parse(start(requests, timeout=timeout_s, metadata=metadata))

    def wait_or_raise(self, attempts: "Attempts", error: RpcUnavailable) -> None:
        """Pause before the next attempt.

        Raises:
            RpcUnavailable: `error`, if there is no next attempt.
        """
        pause_s = attempts.next_pause_s()
        if pause_s is None or self._closed.wait(pause_s):
            raise error
        self.count("retries")

    def token_metadata(self) -> Metadata:
        """What shows the server who calls; follows the token file."""
        return ((METADATA_KEY, bearer(self._token.current())),) if self._token else ()

    def close(self) -> None:
        """Cut all connections; calls in other threads end with RpcError. A second close does nothing."""
        self._closed.set()
        for channel in self._channels:
            channel.close()

    def _translated(self, method: str) -> "_Translated":
        return _Translated(self, method)


class Pending(Generic[T]):
    """A call under way. Either its answer is waited for, once, or it is left."""

    def __init__(self, call: Any, parse: Callable[[bytes], T], translated: "_Translated") -> None:
        self._call, self._parse, self._translated = call, parse, translated

    def answer(self) -> T:
        """What `parse` makes of the answer, when it is there.

        Raises:
            RpcError: As its subclasses say; also when `parse` raises ValueError.
        """
        with contextlib.ExitStack() as ending:
            ending.push(self._translated)
            return self._parse(self._call.result())

    def leave(self, when_over: Callable[[bool], None]) -> None:
        """Wait for nothing. Once the call is over, some thread tells `when_over` whether it succeeded."""

        def end(call: Any) -> None:
            self._translated.__exit__(None, None, None)
            when_over(call.code() is grpc.StatusCode.OK)

        self._call.add_done_callback(end)


class _Translated:
    """Context of one call: gives its metadata, and makes whatever it raises an RpcError, counted once."""

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection = connection
        self._what = f"{method} at {connection.address}"
        self._traced = connection.tracing.client_call(method) if connection.tracing else None

    def __enter__(self) -> Metadata:
        metadata = self._connection.token_metadata()
        return metadata + self._traced.__enter__() if self._traced else metadata

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._traced:
            self._traced.__exit__(kind, error, trace)
        if isinstance(error, grpc.RpcError):
            assert isinstance(error, grpc.Call)
            translated = error_of(error.code(), f"{self._what}: {error.details()}")
        elif isinstance(error, ValueError):  # from a parser, or grpc's way to say that the channel is closed
            translated = RpcError(f"{self._what}: {error}")
        else:
            return
        if not isinstance(translated, RpcUnknown):
            self._connection.count("failed_calls")
        raise translated from error


class Attempts:
    """The deadline of a call, and how often and when it may be tried again within it."""

    def __init__(self, config: ClientConfig, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._left = config.max_attempts - 1
        self._mean_pause_s = config.backoff_s

    @property
    def remaining_s(self) -> float:
        """Time until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def next_pause_s(self) -> float | None:
        """How long to wait before the next attempt, or None if there is none. Doubles, with jitter."""
        pause_s = self._mean_pause_s * random.uniform(0.5, 1.5)  # noqa: S311 - spreads clients, guards nothing
        if not self._left or pause_s >= self.remaining_s:
            return None
        self._left -= 1
        self._mean_pause_s *= 2
        return pause_s


def _end(call: Any) -> None:
    """Cancel a stream unless it is over, and hear the rest of what grpc has to say of it.

    With `SingleThreadedUnaryStream` nobody else does, and grpc keeps a call until all was heard, 16 KiB each.
    """
    call.cancel()
    with contextlib.suppress(AttributeError):  # neither has a public name
        while call._state.due:  # noqa: SLF001
            call._consume_next_event()  # noqa: SLF001


def _path(method: str) -> str:
    return f"/{SERVICE_NAME}/{method}"


def _token_file(address: str, config: ClientConfig) -> TokenFile | None:
    if config.token_file is None:
        return None
    if not config.uses_tls and not is_local(address):
        raise ConfigError(f"the token would travel unencrypted to {address}: set tls_ca, or tls")
    return TokenFile(config.token_file)


def _open_channel(address: str, config: ClientConfig) -> grpc.Channel:
    connect_ms = max(1, round(config.connect_timeout_s * 1000))
    options = (
        *TRANSPORT_OPTIONS,
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", connect_ms),
        ("grpc.min_reconnect_backoff_ms", connect_ms),  # grpc's name for the time a connection may take
        ("grpc.initial_reconnect_backoff_ms", max(1, round(config.backoff_s * 1000))),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_PAUSE_MS),
        ("grpc.enable_retries", 0),  # grpc does not know which calls may be repeated
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        # the thread that reads a stream receives it too, with no other to hand each message over
        ("SingleThreadedUnaryStream", 1),
    )
    if not config.uses_tls:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(config.tls_ca),
        private_key=_read(config.tls_key),
        certificate_chain=_read(config.tls_cert),
    )
    return grpc.secure_channel(address, credentials, options=options)


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
