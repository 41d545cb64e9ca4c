"""Fuzz target over the whole service: malformed, oversized and slow calls against a running server.

::

    python tests/fuzz/fuzz_service.py --seconds 60

Every call must end, with a status that tells the caller what is wrong; the server must stay whole: nothing of
a broken call is left, and what was stored before is still there.
"""

import argparse
import random
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc
from fuzz.fuzz_wire import mutated
from store.running_server import TOKEN, running_server, wait_until, write_token
from store.sample_blocks import sample_block, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.rpc import convert
from tq_store.rpc.convert import METHODS, SERVICE_NAME
from tq_store.rpc.frames import cut_block, pack_frame
from tq_store.rpc.limits import MAX_KEYS
from tq_store.server.app import Server

CALL_TIMEOUT_S = 1.0
PATIENCE_S = 20.0
_SHAPE_S = 0.5
"""grpc answers a call without a request with nothing at all, until the caller gives up."""
FULL = {"call_timeout_s": CALL_TIMEOUT_S, "metrics_port": 0, "memory_budget_bytes": 64 << 20}
_HELD_SOCKETS = 20
HONEST = frozenset({"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED"})
HONEST_OF_GRPC = frozenset({"UNIMPLEMENTED", "CANCELLED", "UNAVAILABLE"})
"""Said of methods that do not exist, calls of a wrong shape and connections that break HTTP/2."""

CORPUS = [
    convert.pack_keys([sample_key(number) for number in range(3)]),
    convert.pack_purge(bytes(32)),
    convert.pack_inspect(sample_key(1)),
    convert.pack_shared_get(bytes(16), [sample_key(1)]),
    convert.pack_shared_put(bytes(16), [(sample_key(1), 512)]),
    *(pack_frame(frame) for frame in cut_block(0, sample_block(7)[1], key=sample_key(7))),
]


class Fuzzer:
    """Makes calls of one seed, one after the other.

    Args:
        server: With the token of the tests.
        rng: Decides everything.
    """

    def __init__(self, server: Server, rng: random.Random) -> None:
        self._server = server
        self._rng = rng
        self._channel = grpc.insecure_channel(server.address)
        self._sockets: list[socket.socket] = []
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        """One call of some kind."""
        kinds = [self._unary, self._stream, self._oversized, self._shape, self._raw, self._slow]
        (kind,) = self._rng.choices(kinds, weights=[40, 40, 8, 8, 8, 1])
        kind()

    def close(self) -> None:
        """Let go of all connections."""
        self._channel.close()
        for held in self._sockets:
            held.close()

    def _metadata(self) -> list[tuple[str, str]]:
        if self._rng.random() < 0.9:
            return [("authorization", f"Bearer {TOKEN}")]
        junk = "".join(self._rng.choices('ab/:\\ "%=', k=self._rng.choice([0, 5, 500])))
        return [("authorization", "Bearer " + junk), ("x-" + "y" * 9, junk.strip()), ("traceparent", "00-zz")]

    def _finish(self, what: str, call: Callable[[], object], also: frozenset[str] = frozenset()) -> None:
        """Make a call to its end, and see that the end is honest."""
        try:
            answer = call()
            if not isinstance(answer, bytes):
                list(answer)  # type: ignore[call-overload]
            status = "OK"
        except grpc.RpcError as error:
            status = error.code().name
        assert status in HONEST | also, f"{what} ended with {status}"
        self.seen[f"{what} {status}"] += 1

    def _path(self, method: str) -> str:
        return f"/{SERVICE_NAME}/{method}"

    def _unary(self) -> None:
        method = self._rng.choice(sorted(METHODS - {"Put"}))
        call = self._channel.unary_stream(self._path(method), None, None)
        request = mutated(self._rng, CORPUS)
        metadata = self._metadata()
        self._finish("malformed", lambda: call(request, metadata=metadata, timeout=PATIENCE_S))

    def _stream(self) -> None:
        blocks = sample_blocks(self._rng.randint(1, 3), self._rng.choice([1, 300, 70_000]), first=100)
        frames = [
            pack_frame(frame)
            for index, (key, data) in enumerate(blocks)
            for frame in cut_block(index, data, key=key)
        ]
        for _ in range(self._rng.randint(0, 3)):
            at = self._rng.randrange(len(frames))
            frames[at : at + 1] = self._rng.choice(
                [[], [frames[at], frames[at]], [mutated(self._rng, frames)], frames[::-1]]
            )
            frames = frames or [b""]
        call = self._channel.stream_unary(self._path("Put"), None, None)
        metadata = self._metadata()
        self._finish("frames", lambda: call(iter(frames), metadata=metadata, timeout=PATIENCE_S))

    def _oversized(self) -> None:
        keys = convert.pack_keys([sample_key(1)] * (MAX_KEYS + 1))
        request = self._rng.choice([keys, bytes(3 << 20), b"\x0a\xff\xff\xff\x7f"])
        path = self._path(self._rng.choice(["Get", "Lookup", "Delete"]))
        call = self._channel.unary_stream(path, None, None)
        metadata = self._metadata()
        self._finish("oversized", lambda: call(request, metadata=metadata, timeout=PATIENCE_S))

    def _slow(self) -> None:
        """A put that stalls, for longer than a call may last."""
        (first, *_) = cut_block(0, sample_block(8, 2 << 20)[1], key=sample_key(8))
        is_over = threading.Event()

        def frames() -> Iterator[bytes]:
            yield pack_frame(first)
            is_over.wait(PATIENCE_S)

        call = self._channel.stream_unary(self._path("Put"), None, None)
        metadata = self._metadata()
        try:
            self._finish("slow", lambda: call(frames(), metadata=metadata, timeout=PATIENCE_S))
        finally:
            is_over.set()

    def _shape(self) -> None:
        """A method that does not exist, or one called as what it is not."""
        path = self._rng.choice([self._path("Made-up"), "/x", "/" + "y" * 200 + "/z", self._path("Get")])
        call = self._channel.stream_stream(path, None, None)
        requests = [mutated(self._rng, CORPUS) for _ in range(self._rng.randint(0, 3))]
        metadata = self._metadata()
        self._finish(
            "shape", lambda: call(iter(requests), metadata=metadata, timeout=_SHAPE_S), HONEST_OF_GRPC
        )

    def _raw(self) -> None:
        """A connection that does not speak HTTP/2, or begins to and then falls silent."""
        host, _, port = self._server.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        junk = self._rng.randbytes(self._rng.choice([0, 9, 4000]))
        connection.sendall(self._rng.choice([junk, opening + junk, opening[:9], b"GET / HTTP/1.1\r\n\r\n"]))
        self._sockets.append(connection)
        if len(self._sockets) > _HELD_SOCKETS:
            self._sockets.pop(0).close()
        self.seen["raw"] += 1


def _gauge(server: Server, name: str) -> float:
    assert server.metrics_url is not None
    with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[1])


def fuzz(directory: Path, seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Call a server for as long as `keep_going(calls so far)` holds; returns what was seen.

    Raises:
        AssertionError: A call ended dishonestly, or the server did not stay whole; the message says which.
    """
    key, block = sample_block(1)
    token_file = write_token(directory)
    with ExitStack() as open_things:
        server = open_things.enter_context(
            running_server(token_file=token_file, local_socket=directory / "socket", **FULL)
        )
        config = ClientConfig(token_file=token_file)
        client = open_things.enter_context(StoreClient(server.address, config=config))
        fuzzer = Fuzzer(server, random.Random(seed))
        open_things.callback(fuzzer.close)
        calls = 0
        while keep_going(calls):
            try:
                fuzzer.run()
            except AssertionError as error:
                raise AssertionError(f"{error}; call {calls} of seed {seed}") from error
            calls += 1
        client.put([(key, block)])
        assert [got for _, got in client.get([key])] == [block], "what is stored does not come back"
        for name in ("active_requests", "inflight_bytes", "outflight_bytes"):
            wait_until(lambda name=name: _gauge(server, f"tq_store_{name}") == 0)
        assert _gauge(server, "process_open_fds") < 200 + _HELD_SOCKETS, "connections are left open"
        return fuzzer.seen


def main() -> None:
    """Fuzz for a time and print what was seen; a finding ends it with a traceback and status 1."""
    import tempfile

    parser = argparse.ArgumentParser(description="Fuzz a running server.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as directory:
        seen = fuzz(Path(directory), seed, lambda _: time.monotonic() < deadline)
    print(f"seed {seed}, {seen.total()} calls:")
    for what, count in sorted(seen.items()):
        print(f"{count:8} {what}")


if __name__ == "__main__":
    main()
