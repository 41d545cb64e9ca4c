"""Fuzz target over a running server: malformed, oversized and slow calls, and bytes that are no calls at all.

Whatever comes, the server answers with a status that blames the caller, holds nothing for those that are
gone, logs no error, and serves the next well-formed call.
"""

import logging
import random
import socket
import tempfile
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from fuzz import fuzz_frames, fuzz_messages
from fuzz.driver import mutated, unpacked_list
from store.running_server import TOKEN, running_server, wait_until, write_token
from store.sample_blocks import sample_block

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.rpc.convert import METHODS, SERVICE_NAME
from tq_store.rpc.limits import MAX_MESSAGE_BYTES
from tq_store.rpc.token import METADATA_KEY, bearer
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server.app import Server

_METHODS = [*sorted(METHODS), "Prefetch", "", "Get/Put"]
_CALL, _SLOW_PUT, _HTTP2, _HTTP1, _SHAPE = range(5)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n"
_HTTP2_PIECES = [
    # length, type, flags, stream of frames: too long, of unknown type, on a stream that is not open
    *(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", b"\x00\x00\x00\x63\x00\x00\x00\x00\x00", _SETTINGS),
    *(
        b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08",
        b"\x00\x00\x08\x06\x00\x00\x00\x00\x00pingping",
    ),
    *(
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff",
        b"\x00\x00\x05\x01\x04\x00\x00\x00\x01\x82\x86\x84\x41\xff",
    ),
    *(
        b"\x00\x00\x01\x09\x04\x00\x00\x00\x01\x00",
        b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff",
    ),
]
_HTTP1_PIECES = [
    b"\r\n",
    b"\x00",
    b"GET ",
    b"POST ",
    b" HTTP/9.9",
    b"A: b\r\n" * 200,
    b"/" * 9000,
    b"%",
    b"\xff",
]
_BLAMES_CALLER = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
_SHOWN = ((METADATA_KEY, bearer(TOKEN)),)
_CALL_TIMEOUT_S = 2.0
_SHAPE_S = 0.5
"""grpc answers a call without a request with nothing at all, until the caller gives up."""
_PATIENCE_S = 20.0
_SLOW_AT_ONCE = 24
_LINGERING = 24
_MAX_OPEN = 200


def generate(rng: random.Random) -> bytes:
    """A kind, and what goes with it."""
    kind = rng.choices(range(5), weights=(32, 2, 5, 3, 1))[0]
    if kind == _HTTP2:
        return bytes([kind]) + mutated(rng, _PREFACE + _SETTINGS, _HTTP2_PIECES)
    if kind == _HTTP1:
        return bytes([kind]) + mutated(rng, _REQUEST, _HTTP1_PIECES)
    if kind == _SLOW_PUT:
        return bytes([kind]) + fuzz_frames.generate(rng)
    # the highest bit asks for a token that is none
    method = rng.randrange(len(_METHODS))
    choice = method | (0x80 if rng.random() < 0.05 else 0)
    if _METHODS[method] == "Put" or kind == _SHAPE:
        return bytes([kind, choice]) + fuzz_frames.generate(rng)[1:]
    message = fuzz_messages.generate(rng)[1:]
    if rng.random() < 0.02:
        message = bytes(rng.choice([MAX_MESSAGE_BYTES - 1, MAX_MESSAGE_BYTES + 1, 4 * MAX_MESSAGE_BYTES]))
    return bytes([kind, choice]) + message


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a server of small limits, which afterwards must be idle and healthy and have logged no error."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            running_server(
                token_file=write_token(Path(directory)),
                local_socket=Path(directory) / "socket",
                memory_budget_bytes=1 << 20,
                max_inflight_bytes=1 << 20,
                call_timeout_s=_CALL_TIMEOUT_S,
                max_concurrent_calls=4 * _SLOW_AT_ONCE,
                metrics_port=0,
            ) as server,
        ):
            with _Caller(server) as caller:
                yield caller.feed
            wait_until(lambda: _is_idle(server))
            key, block = sample_block(1)
            config = ClientConfig(token_file=Path(directory) / "token", lookup_timeout_s=_PATIENCE_S)
            with StoreClient(server.address, config=config) as client:
                client.put([(key, block)])
                assert [served for _, served in client.get([key])] == [block], "the server stores no more"
    finally:
        logging.getLogger().removeHandler(handler)
    assert not errors, f"the server logged {errors[:3]}"


class _Caller:
    """Calls a server, keeps some calls and sockets open on purpose, and sees after each that it answers."""

    def __init__(self, server: Server) -> None:
        host, port = server.address.rsplit(":", 1)
        self._grpc = (host, int(port))
        assert server.metrics_url is not None
        self._http = (host, int(server.metrics_url.rsplit(":", 1)[1].split("/")[0]))
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(server.address, options=options)
        self._lingering: deque[socket.socket] = deque()
        self._slow: deque[tuple[grpc.Future, threading.Event]] = deque()

    def __enter__(self) -> "_Caller":
        return self

    def __exit__(self, *_: object) -> None:
        for _call, may_end in self._slow:
            may_end.set()
        for left in self._lingering:
            left.close()
        self._channel.close()

    def feed(self, data: bytes) -> Iterator[str]:
        kind = (data or b"\0")[0] % 5
        if kind == _HTTP2:
            yield self._send_raw(self._grpc, data[1:])
        elif kind == _HTTP1:
            yield self._send_raw(self._http, data[1:])
        elif kind == _SLOW_PUT:
            yield self._put_slowly(unpacked_list(data[2:]))
        else:
            choice = (data[1:2] or b"\0")[0]
            token = "Bearer not-the-token" if choice & 0x80 else bearer(TOKEN)
            yield self._call(kind, _METHODS[(choice & 0x7F) % len(_METHODS)], data[2:], token)
        stubs.BlockStoreStub(self._channel).Ping(pb.PingRequest(), timeout=_PATIENCE_S, metadata=_SHOWN)

    def _call(self, kind: int, method: str, data: bytes, token: str) -> str:
        path, shown = f"/{SERVICE_NAME}/{method}", ((METADATA_KEY, token),)
        try:
            if kind == _SHAPE:
                messages = iter(unpacked_list(data))
                for _ in self._channel.stream_stream(path)(messages, timeout=_SHAPE_S, metadata=shown):
                    pass
            elif method == "Put":
                messages = iter(unpacked_list(data))
                self._channel.stream_unary(path)(messages, timeout=_PATIENCE_S, metadata=shown)
            elif method == "Get":
                for _ in self._channel.unary_stream(path)(data, timeout=_PATIENCE_S, metadata=shown):
                    pass
            else:
                self._channel.unary_unary(path)(data, timeout=_PATIENCE_S, metadata=shown)
        except grpc.RpcError as error:
            status, details = error.code(), error.details()
        else:
            return f"{method or 'nameless'} answered"
        assert status in _BLAMES_CALLER, f"{method} was answered with {status}: {details}"
        return f"{'misshapen ' if kind == _SHAPE else ''}{method or 'nameless'} {status.name}"

    def _put_slowly(self, frames: list[bytes]) -> str:
        """Send some frames and then nothing, until the server ends it or too many are open."""
        may_end = threading.Event()

        def trickle() -> Iterator[bytes]:
            yield from frames
            may_end.wait(_PATIENCE_S)

        call = self._channel.stream_unary(f"/{SERVICE_NAME}/Put").future(
            trickle(), timeout=_PATIENCE_S, metadata=_SHOWN
        )
        self._slow.append((call, may_end))
        if len(self._slow) < _SLOW_AT_ONCE:
            return "slow put"
        oldest, may_end = self._slow.popleft()
        may_end.set()
        error = oldest.exception(_PATIENCE_S)
        assert error is None or error.code() in _BLAMES_CALLER, f"a slow put was answered with {error.code()}"
        return "slow put ended"

    def _send_raw(self, address: tuple[str, int], data: bytes) -> str:
        """Send bytes and keep the socket for a while, reading nothing."""
        try:
            opened = socket.create_connection(address, timeout=_PATIENCE_S)
            self._lingering.append(opened)
            opened.sendall(data)
        except OSError:
            return "cut off"
        if len(self._lingering) > _LINGERING:
            self._lingering.popleft().close()
        return "raw bytes"


def _is_idle(server: Server) -> bool:
    """Nothing in flight, nothing held and no connection left open, as its metrics say."""

    assert server.metrics_url is not None
    with urllib.request.urlopen(server.metrics_url, timeout=_PATIENCE_S) as answer:
        text = answer.read().decode()
    gauges = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    held = ("inflight_bytes", "outflight_bytes", "active_requests")
    return float(gauges["process_open_fds"]) < _MAX_OPEN and all(
        float(gauges[f"tq_store_{name}"]) == 0 for name in held
    )
