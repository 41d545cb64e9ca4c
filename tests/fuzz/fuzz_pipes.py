"""Fuzz target over pipes: what a server makes of a client's beginning, and a client of what a server writes.

Whatever comes, a ticket that is not exactly right opens nothing, and a client has blocks that came whole, in
order, or none.
"""

import contextlib
import queue
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from fuzz.driver import mutated
from store.running_server import running_server
from store.sample_blocks import bytes_of, keys_of, sample_blocks

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import RpcError
from tq_store.rpc import convert
from tq_store.rpc.connection import Connection
from tq_store.rpc.limits import PIPE_NAME_BYTES, TICKET_BYTES
from tq_store.rpc.parcels import cut_parcels
from tq_store.rpc.pipe import Pipe

_OPEN, _GET, _READ = range(3)
_CALL = 0x1234_5678_9ABC_DEF0
_BLOCKS: list[bytes | None] = [b"a" * 300, None, b"b" * 70_000, b"c"]
_STREAM = b"".join(piece for step in cut_parcels(_CALL, 0, _BLOCKS) for piece in step)
_HEADERS = [
    _CALL.to_bytes(8, "little") + index.to_bytes(4, "little") + num_bytes.to_bytes(4, "little")
    for index, num_bytes in ((0, 2**32 - 1), (1, MAX_BLOCK_BYTES), (2, MAX_BLOCK_BYTES + 1), (3, 1), (4, 0))
]
_PATIENCE_S = 20.0
_LINGERING = 24
_STORED = sample_blocks(3, 1000)


def generate(rng: random.Random) -> bytes:
    """A kind, and what goes with it: changes to a ticket and bytes after it, a request, or a stream."""
    kind = rng.choices(range(3), weights=(4, 2, 4))[0]
    if kind == _OPEN:
        change = bytes(TICKET_BYTES) if rng.random() < 0.4 else mutated(rng, bytes(TICKET_BYTES))
        return (
            bytes([kind])
            + change
            + (rng.randbytes(rng.choice([1, 100, 70_000])) if rng.random() < 0.2 else b"")
        )
    if kind == _GET:
        request = convert.pack_piped_get(bytes(PIPE_NAME_BYTES), _CALL, keys_of(_STORED))
        return bytes([kind]) + mutated(rng, request)
    return bytes([kind]) + mutated(rng, _STREAM, _HEADERS)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With a server that has few pipes, which afterwards must give out blocks as before."""
    with running_server(payload_pipes=_LINGERING) as server:
        config = ClientConfig(transfer_timeout_s=_PATIENCE_S, lookup_timeout_s=_PATIENCE_S)
        with StoreClient(server.address, config=config) as client, _Peer(server.address) as peer:
            client.put(_STORED)
            yield peer.feed
            peer.hang_up()
            assert [block for _, block in client.get(keys_of(_STORED))] == bytes_of(_STORED)
            assert client.counters["broken_pipes"] == 0, "the server broke a pipe"


class _Peer:
    """A client of a server, and a server to a client; both say what they are told."""

    def __init__(self, address: str) -> None:
        self._connection = Connection(address, ClientConfig())
        self._lingering: deque[socket.socket] = deque()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._writes: queue.Queue[bytes | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "_Peer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._writes.put(None)
        self._thread.join()
        self._listener.close()
        self._connection.close()

    def hang_up(self) -> None:
        while self._lingering:
            self._lingering.popleft().close()

    def feed(self, data: bytes) -> Iterator[str]:
        kind = (data or b"\0")[0] % 3
        if kind == _OPEN:
            yield self._open(data[1:])
        elif kind == _GET:
            yield self._get(data[1:])
        else:
            yield from self._read(data[1:])

    def _open(self, change: bytes) -> str:
        """Show a ticket with some bits changed, and more or less than it."""
        port, ticket = self._connection.ask("OpenPipe", b"", convert.parse_opened_pipe, timeout_s=_PATIENCE_S)
        if not port:
            self.hang_up()
            return "full"
        shown = bytes(a ^ b for a, b in zip(ticket, change, strict=False)) + change[TICKET_BYTES:]
        end = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
        self._lingering.append(end)
        with contextlib.suppress(OSError):
            end.sendall(shown)
            if len(shown) < TICKET_BYTES:
                return "slow"  # it stays, and says nothing more
            name = end.recv(PIPE_NAME_BYTES, socket.MSG_WAITALL)
            assert bool(name) <= (shown[:TICKET_BYTES] == ticket), "a ticket that is none opened a pipe"
            return "opened" if name else "refused ticket"
        return "cut off"

    def _get(self, request: bytes) -> str:
        """Ask for blocks to be written to a pipe that is not there."""
        try:
            for _ in self._connection.receive("GetPiped", request, timeout_s=_PATIENCE_S):
                raise AssertionError("a pipe that nobody opened was written to")
        except RpcError as error:
            status = getattr(error.__cause__, "code", lambda: None)()
        assert status is grpc.StatusCode.INVALID_ARGUMENT, f"a get was answered with {status}"
        return "refused get"

    def _read(self, stream: bytes) -> Iterator[str]:
        """Read what a server writes, up to the first thing that is wrong."""
        self._writes.put(stream)
        port = self._listener.getsockname()[1]
        pipe = Pipe("127.0.0.1", port, bytes(TICKET_BYTES), context=None, timeout_s=_PATIENCE_S)
        received = 0
        with contextlib.closing(pipe):
            for index in range(len(_BLOCKS)):
                try:
                    block = pipe.receive_block(_CALL, index, _PATIENCE_S)
                except (EOFError, ValueError, OSError) as error:
                    yield f"broken {type(error).__name__}"
                    return
                received += 16 + len(block or b"")
                assert received <= len(stream), "more than was sent"
                yield "block" if block else "missing"

    def _serve(self) -> None:
        while (stream := self._writes.get()) is not None:
            end, _ = self._listener.accept()
            with end, contextlib.suppress(OSError):
                end.recv(TICKET_BYTES, socket.MSG_WAITALL)
                end.sendall(bytes(PIPE_NAME_BYTES) + stream)
