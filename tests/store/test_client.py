import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc._channel as grpc_channel
import pytest
from store.running_server import WAIT_S, foreign_server, running_server, wait_until, write_token
from store.sample_blocks import NAMESPACE, bytes_of, keys_of, sample_block, sample_blocks, sample_key

from tq_store.block import HEADER_BYTES, BlockKind, verify_block
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcError, RpcTimeout, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome, PutOutcome
from tq_store.rpc import streamed
from tq_store.rpc.connection import Attempts, Connection
from tq_store.rpc.limits import MAX_FRAME_BYTES, MAX_KEYS
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server import read_ahead as read_ahead_module

PATIENT = ClientConfig(lookup_timeout_s=WAIT_S, transfer_timeout_s=WAIT_S, backoff_s=0.01)
STORED, PRESENT, INVALID = PutOutcome.STORED, PutOutcome.PRESENT, PutOutcome.INVALID


@contextmanager
def client_of(servicer: stubs.BlockStoreServicer) -> Iterator[StoreClient]:
    with foreign_server(servicer) as address, StoreClient(address, config=PATIENT) as client:
        yield client


@pytest.fixture
def client() -> Iterator[StoreClient]:
    with running_server() as server, StoreClient(server.address, config=PATIENT) as opened:
        yield opened


def test_the_whole_life_of_blocks(client: StoreClient) -> None:
    blocks = [sample_block(1, 256), sample_block(2, 3 * MAX_FRAME_BYTES), sample_block(3, 256)]
    keys = [*keys_of(blocks), sample_key(4)]
    assert client.lookup(keys) == 0
    assert client.put(blocks[:2]) == [STORED, STORED]
    assert client.put(iter(blocks)) == [PRESENT, PRESENT, STORED]
    assert client.lookup(keys) == 3
    assert client.contains(keys) == [True, True, True, False]
    assert list(client.get(keys[::-1])) == list(enumerate([None, *bytes_of(blocks)[::-1]]))
    assert client.delete([keys[0], keys[3]]) == [True, False]
    assert client.lookup(keys) == 0
    (copy,) = client.inspect(keys[1])
    assert (copy.tier, copy.block_bytes, copy.problem) == ("memory", len(blocks[1][1]), "")
    assert client.stats().tiers["memory"].num_blocks == 2
    assert client.purge(bytes(32)) == 0
    assert client.purge(NAMESPACE) == 2
    client.put(blocks)
    assert client.purge(None) == 3
    pong = client.ping()
    assert 0 < pong.latency_s < WAIT_S
    assert pong.version == client.stats().version
    assert set(client.counters.values()) == {0}


def test_nothing_asked_is_answered_without_a_server() -> None:
    with StoreClient("127.0.0.1:1") as client:
        assert client.lookup([]) == 0
        assert client.contains([]) == client.delete([]) == client.put([]) == list(client.get([])) == []


def test_more_keys_than_a_call_takes_are_asked_in_several(client: StoreClient) -> None:
    blocks = sample_blocks(3)
    client.put(blocks)
    keys = keys_of(blocks) * (MAX_KEYS // 2)
    assert client.lookup(keys) == len(keys)
    assert client.lookup([*keys, sample_key(9), *keys]) == len(keys)
    assert client.contains([*keys, sample_key(9)]) == [True] * len(keys) + [False]
    got = list(client.get(keys[: MAX_KEYS + 5]))
    assert got == [(position, blocks[position % 3][1]) for position in range(MAX_KEYS + 5)]
    assert client.delete(keys[: MAX_KEYS + 1]) == [True] * 3 + [False] * (MAX_KEYS - 2)


class Counting(stubs.BlockStoreServicer):
    """Stores nothing, but notes how many blocks each put brings."""

    def __init__(self) -> None:
        self.puts: list[int] = []

    def Put(self, frames: Iterator[pb.BlockFrame], context: object) -> pb.PutResponse:
        self.puts.append(sum(not frame.offset for frame in frames))
        return pb.PutResponse(outcomes=[pb.PUT_OUTCOME_STORED] * self.puts[-1])


@pytest.mark.parametrize(("limit", "value"), [("MAX_KEYS", 3), ("MAX_PUT_BYTES", 3 * 512)])
def test_more_blocks_than_a_put_takes_are_sent_in_several(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(streamed, limit, value)
    blocks = sample_blocks(8)
    impossible = [(sample_key(20), b""), (BlockKey(b"short"), blocks[0][1])]
    servicer = Counting()
    with client_of(servicer) as client:
        outcomes = client.put([*blocks[:3], impossible[0], *blocks[3:], impossible[1]])
        assert outcomes == [STORED] * 3 + [INVALID] + [STORED] * 5 + [INVALID]
        assert servicer.puts == [3, 3, 2]
        assert client.put(impossible) == [INVALID, INVALID]


def test_a_block_over_the_limit_is_not_sent(client: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tq_store.rpc.shared.MAX_BLOCK_BYTES", 600)
    monkeypatch.setattr(streamed, "MAX_PUT_BYTES", 600)
    assert client.put([sample_block(1, 345), sample_block(2, 344)]) == [INVALID, STORED]


def test_an_unsound_block_is_not_stored(client: StoreClient) -> None:
    (key, data), (other, _) = sample_blocks(2)
    assert client.put([(key, data[:-1]), (other, data), (key, data)]) == [INVALID, INVALID, STORED]


def test_a_source_of_blocks_that_fails_fails_the_put(client: StoreClient) -> None:
    def source() -> Iterator[tuple[BlockKey, bytes]]:
        yield sample_block(1)
        raise OSError("the engine is gone")

    with pytest.raises(RpcError):
        client.put(source())


def test_a_source_that_fails_at_once_raises_what_every_failure_does(client: StoreClient) -> None:
    def source() -> Iterator[tuple[BlockKey, bytes]]:
        raise OSError("the engine is gone")
        yield sample_block(1)

    with pytest.raises(RpcError, match="could not be had: the engine is gone"):
        client.put(source())
    with pytest.raises(RpcError, match="could not be had"):
        client.put(None)  # type: ignore[arg-type]


def test_many_threads_share_a_client(client: StoreClient) -> None:
    def use(first: int) -> bool:
        blocks = sample_blocks(20, 5000, first=first)
        client.put(blocks)
        return client.lookup(keys_of(blocks)) == 20 and [
            b for _, b in client.get(keys_of(blocks))
        ] == bytes_of(blocks)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(0, 160, 20)))


def test_a_dead_port_fails_at_once_and_is_tried_again() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with StoreClient(address, config=ClientConfig(backoff_s=0.001, max_attempts=4)) as client:
            calls: list[Callable[[], Any]] = [
                lambda: client.lookup([sample_key(1)]),
                lambda: list(client.get([sample_key(1)])),
                client.ping,
            ]
            for number, call in enumerate(calls, 1):
                with pytest.raises(RpcUnavailable, match=address):
                    call()
                assert client.counters["retries"] == 3 * number
                assert client.counters["failed_calls"] == 4 * number
            changes: list[Callable[[], Any]] = [
                lambda: client.put([sample_block(1)]),
                lambda: client.delete([sample_key(1)]),
                lambda: client.purge(None),
            ]
            for call in changes:
                with pytest.raises(RpcUnavailable):
                    call()
            assert client.counters["retries"] == 3 * len(calls)


def test_there_is_no_attempt_after_the_deadline() -> None:
    config = ClientConfig(lookup_timeout_s=0.2, backoff_s=10.0, max_attempts=100)
    with StoreClient("127.0.0.1:1", config=config) as client:
        with pytest.raises(RpcUnavailable):
            client.ping()
        assert client.counters["retries"] == 0


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ClientConfig(lookup_timeout_s=0.2, transfer_timeout_s=0.2), RpcTimeout),
        (ClientConfig(connect_timeout_s=0.1, max_attempts=1), RpcUnavailable),
    ],
)
def test_a_socket_that_never_answers_is_given_up(config: ClientConfig, kind: type[RpcError]) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        StoreClient(f"127.0.0.1:{listener.getsockname()[1]}", config=config) as client,
    ):
        started = time.monotonic()
        calls: list[Callable[[], Any]] = [
            lambda: client.lookup([sample_key(1)]),
            lambda: list(client.get([sample_key(1)])),
            lambda: client.put([sample_block(1)]),
        ]
        for call in calls:
            with pytest.raises(kind):
                call()
        assert time.monotonic() - started < 5


BLOCKS = [sample_block(number, 2 * MAX_FRAME_BYTES) for number in range(3)]
MIB = MAX_FRAME_BYTES


def honest(index: int, data: bytes | None = None) -> list[pb.BlockFrame]:
    data = BLOCKS[index][1] if data is None else data
    return [
        pb.BlockFrame(
            index=index,
            offset=offset,
            block_bytes=0 if offset else len(data),
            data=data[offset : offset + MIB],
        )
        for offset in range(0, len(data), MIB)
    ]


def flipped(position: int) -> bytes:
    data = bytearray(BLOCKS[1][1])
    data[position] ^= 1
    return bytes(data)


class Foreign(stubs.BlockStoreServicer):
    """Answers a Get with scripts, one after the other; notes what was asked."""

    def __init__(self, *scripts: Iterable[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[bytes]] = []
        self.was_cancelled = threading.Event()

    def Get(self, request: pb.Keys, context: grpc.ServicerContext) -> Iterator[pb.BlockFrame]:
        self.asked.append(list(request.keys))
        context.add_callback(self.was_cancelled.set)
        for step in self.scripts.pop(0):
            if isinstance(step, grpc.StatusCode):
                context.abort(step, "as the script says")
            yield step


def test_the_requests_of_a_call_share_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    left_s: list[float] = []
    original = Connection.ask

    def noting(connection: Connection, method: str, *arguments: Any, **named: Any) -> Any:
        left_s.append(named["timeout_s"])
        return original(connection, method, *arguments, **named)

    monkeypatch.setattr(Connection, "ask", noting)
    keys = [sample_key(1)] * (2 * MAX_KEYS + 1)
    with running_server() as server, StoreClient(server.address, config=PATIENT) as client:
        client.put([sample_block(1)])
        for call in (client.lookup, client.contains):
            left_s.clear()
            call(keys)
            assert PATIENT.lookup_timeout_s > left_s[0] > left_s[1] > left_s[2] > 0


REJECTED, BROKEN, PIPES = "rejected_blocks", "broken_streams", "broken_pipes"
HONEST_END = honest(2)


@pytest.mark.parametrize(
    ("lie", "counter"),
    [
        (honest(1, flipped(300)), REJECTED),
        (honest(1, flipped(40)), REJECTED),
        (honest(1, BLOCKS[0][1]), REJECTED),
        (honest(1, BLOCKS[1][1][:-1]), REJECTED),
        (honest(1, BLOCKS[1][1][:100]), REJECTED),
        (honest(1, BLOCKS[1][1] + b"x"), REJECTED),
        (honest(1, b"no block"), REJECTED),
    ],
    ids=["payload", "header", "other block", "short", "shorter than a header", "long", "garbage"],
)
def test_a_block_that_does_not_verify_is_a_miss_and_the_others_are_not(
    lie: list[pb.BlockFrame], counter: str
) -> None:
    with client_of(Foreign([*honest(0), *lie, *HONEST_END])) as client:
        got = [data for _, data in client.get(keys_of(BLOCKS))]
        assert got == [BLOCKS[0][1], None, BLOCKS[2][1]]
        assert client.counters == {REJECTED: 0, BROKEN: 0, PIPES: 0, "retries": 0, "failed_calls": 0} | {
            counter: 1
        }


@pytest.mark.parametrize(
    "lie",
    [
        [honest(1)[0], pb.BlockFrame(index=1, offset=MIB, data=bytes(MIB + 300))],
        [honest(1)[0]],
        honest(1)[1:],
        honest(1)[::-1],
        honest(1)[:1] * 2,
        honest(2),
        honest(0),
        [pb.BlockFrame(index=1, block_bytes=1 << 60, data=b"x")],
        [pb.BlockFrame(index=1, block_bytes=1 << 20)],
        [pb.BlockFrame(index=1, data=b"x")],
        [pb.BlockFrame(index=1, block_bytes=1, data=b"x", key=BLOCKS[1][0])],
        [pb.BlockFrame(index=4_000_000_000)],
    ],
    ids=[
        "longer than declared",
        "end missing",
        "begin missing",
        "swapped",
        "repeated",
        "index too high",
        "index too low",
        "huge declaration",
        "empty frame",
        "undeclared",
        "key in a get",
        "index out of range",
    ],
)
def test_a_server_that_breaks_the_order_of_frames_is_not_read_further(lie: list[pb.BlockFrame]) -> None:
    with client_of(Foreign([*honest(0), *lie, *HONEST_END])) as client:
        got = [data for _, data in client.get(keys_of(BLOCKS))]
        assert got == [BLOCKS[0][1], None, None]
        assert client.counters == {REJECTED: 0, BROKEN: 1, PIPES: 0, "retries": 0, "failed_calls": 0}


def test_frames_after_the_last_block_change_nothing() -> None:
    extra = [pb.BlockFrame(index=3), *honest(2)]
    with client_of(Foreign([*honest(0), *honest(1), *honest(2), *extra])) as client:
        assert list(client.get(keys_of(BLOCKS))) == list(enumerate(bytes_of(BLOCKS)))
        assert client.counters[BROKEN] == 1


def test_an_endless_stream_of_frames_ends_at_the_first_wrong_one() -> None:
    def endless() -> Iterator[pb.BlockFrame]:
        while True:
            yield honest(0)[0]

    servicer = Foreign(endless())
    with client_of(servicer) as client:
        assert [data for _, data in client.get(keys_of(BLOCKS))] == [None, None, None]
        assert servicer.was_cancelled.wait(WAIT_S)


def test_an_answer_that_stops_early_leaves_misses() -> None:
    with client_of(Foreign(honest(0), honest(0)[:1])) as client:
        assert [data for _, data in client.get(keys_of(BLOCKS))] == [BLOCKS[0][1], None, None]
        assert [data for _, data in client.get(keys_of(BLOCKS))] == [None, None, None]


def test_a_get_goes_on_where_the_connection_was_lost() -> None:
    lost = grpc.StatusCode.UNAVAILABLE
    rest = [pb.BlockFrame(index=0), *honest(1)]  # positions count from the key that was asked first
    servicer = Foreign([*honest(0), *honest(1)[:1], lost], [lost], rest)
    with client_of(servicer) as client:
        got = client.get([*keys_of(BLOCKS[:1]), sample_key(9), *keys_of(BLOCKS[1:2])])
        assert list(got) == [(0, BLOCKS[0][1]), (1, None), (2, BLOCKS[1][1])]
        assert [len(keys) for keys in servicer.asked] == [3, 2, 2]
        assert client.counters["retries"] == 2


def test_a_get_that_fails_on_the_way_raises_after_what_it_got() -> None:
    servicer = Foreign([*honest(0), grpc.StatusCode.INTERNAL])
    with client_of(servicer) as client:
        got = client.get(keys_of(BLOCKS))
        assert next(got) == (0, BLOCKS[0][1])
        with pytest.raises(RpcError, match="as the script says"):
            next(got)
        assert client.counters["failed_calls"] == 1


def test_a_failure_after_the_last_block_does_not_matter() -> None:
    with client_of(Foreign([*honest(0), grpc.StatusCode.INTERNAL])) as client:
        assert list(client.get(keys_of(BLOCKS[:1]))) == [(0, BLOCKS[0][1])]


def test_nothing_is_kept_of_streams_that_were_left(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc keeps a call until all was heard of it, which nobody does for it where a stream has one thread."""
    calls: list[Any] = []
    made = grpc_channel._SingleThreadedRendezvous.__init__

    def noting(call: Any, *arguments: Any) -> None:
        made(call, *arguments)
        calls.append(call)

    monkeypatch.setattr(grpc_channel._SingleThreadedRendezvous, "__init__", noting)
    blocks = sample_blocks(3)
    client.put(blocks)
    assert len(list(client.get(keys_of(blocks)))) == 3
    for position, block in client.get(keys_of(blocks)):
        assert (position, block) == (0, blocks[0][1])
        break
    places = [
        PlacedBlock(key, BlockKind(verify_block(data)), [memoryview(bytearray(len(data) - HEADER_BYTES))])
        for key, data in blocks
    ]
    assert list(client.get_into(keys_of(blocks), [places])) == [[GetOutcome.FILLED] * 3]
    assert len(calls) == 3
    assert not [call for call in calls if call._state.due]


def test_a_reader_that_stops_early_cancels_the_call() -> None:
    go_on = threading.Event()

    def slow() -> Iterator[pb.BlockFrame]:
        yield from honest(0)
        go_on.wait(WAIT_S)
        yield from honest(1)

    servicer = Foreign(slow())
    with client_of(servicer) as client:
        for _ in client.get(keys_of(BLOCKS)):
            break
        assert servicer.was_cancelled.wait(WAIT_S)
        go_on.set()


class Honest(stubs.BlockStoreServicer):
    """Has all blocks; notes which connections asked for how many, and fails once for each of `failures`."""

    def __init__(self, failures: Iterable[BlockKey] = ()) -> None:
        self.peers: list[str] = []
        self.num_asked: list[int] = []
        self._failures = set(failures)

    def Get(self, request: pb.Keys, context: grpc.ServicerContext) -> Iterator[pb.BlockFrame]:
        self.peers.append(context.peer())
        self.num_asked.append(len(request.keys))
        for index, key in enumerate(request.keys):
            if key in self._failures:
                self._failures.remove(BlockKey(key))
                context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
            yield from honest(index, BLOCKS[keys_of(BLOCKS).index(BlockKey(key))][1])


SEVERAL = ClientConfig(transfer_timeout_s=WAIT_S, backoff_s=0.01, connections=3)


def test_several_connections_share_the_blocks_of_a_get() -> None:
    servicer = Honest()
    blocks = [BLOCKS[number % 3] for number in range(20)]
    with foreign_server(servicer) as address, StoreClient(address, config=SEVERAL) as client:
        assert [data for _, data in client.get(keys_of(blocks))] == bytes_of(blocks)
        assert len(set(servicer.peers)) == 3
        assert sum(servicer.num_asked) == 20
        assert 1 in servicer.num_asked
        assert max(servicer.num_asked) > 1, "runs grow"
        servicer.peers.clear()
        assert list(client.get(keys_of(blocks)[:1])) == [(0, BLOCKS[0][1])]
        assert len(servicer.peers) == 1
        assert client.counters == {REJECTED: 0, BROKEN: 0, PIPES: 0, "retries": 0, "failed_calls": 0}


def test_a_connection_of_several_that_fails_costs_what_is_asked_again() -> None:
    servicer = Honest(keys_of(BLOCKS)[1:2])
    with foreign_server(servicer) as address, StoreClient(address, config=SEVERAL) as client:
        assert list(client.get(keys_of(BLOCKS))) == list(enumerate(bytes_of(BLOCKS)))
        assert (client.counters["retries"], client.counters["failed_calls"]) == (1, 1)


def test_a_reader_that_stops_ends_the_calls_on_all_connections() -> None:
    class Endless(Honest):
        """After its first answer it says nothing more, until the call is cancelled."""

        def __init__(self) -> None:
            super().__init__()
            self.num_cancelled = threading.Semaphore(0)

        def Get(self, request: pb.Keys, context: grpc.ServicerContext) -> Iterator[pb.BlockFrame]:
            if request.keys[0] == BLOCKS[0][0]:
                yield from super().Get(request, context)
                return
            self.peers.append(context.peer())
            cancelled = threading.Event()
            context.add_callback(cancelled.set)
            cancelled.wait(WAIT_S)
            self.num_cancelled.release()

    servicer = Endless()
    with foreign_server(servicer) as address, StoreClient(address, config=SEVERAL) as client:
        reading = client.get([BLOCKS[0][0], BLOCKS[1][0], BLOCKS[2][0]])
        assert next(reading) == (0, BLOCKS[0][1])
        wait_until(lambda: len(servicer.peers) == 3)
        reading.close()
        for _ in range(2):
            assert servicer.num_cancelled.acquire(timeout=WAIT_S)
        assert client.counters["failed_calls"] == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tq-store-get")]


def test_connections_do_not_keep_each_other_out_of_the_servers_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The block that the reader wants first is the last to ask for room, when others have filled it."""
    blocks = sample_blocks(3, 24 * MIB)
    is_full, read = threading.Event(), read_ahead_module._Group._read

    async def first_comes_last(group: Any) -> list[bytes | None]:
        while group._keys == [blocks[0][0]] and not is_full.is_set():
            await asyncio.sleep(0.01)
        found = await read(group)
        if found:
            is_full.set()
        return found

    monkeypatch.setattr(read_ahead_module._Group, "_read", first_comes_last)
    with (
        running_server(max_outflight_bytes=8 * MIB) as server,
        StoreClient(server.address, config=SEVERAL) as client,
    ):
        client.put(blocks)
        assert [data for _, data in client.get(keys_of(blocks))] == bytes_of(blocks)
        assert client.counters["failed_calls"] == 0


class Liar(stubs.BlockStoreServicer):
    """Gives answers that do not fit the questions."""

    def Lookup(self, request: pb.Keys, context: object) -> pb.LookupResponse:
        return pb.LookupResponse(num_leading_hits=len(request.keys) + 1)

    def Contains(self, request: pb.Keys, context: object) -> pb.Flags:
        return pb.Flags(flags=[True] * (len(request.keys) - 1))

    Delete = Contains

    def Put(self, frames: Iterator[pb.BlockFrame], context: object) -> pb.PutResponse:
        num_blocks = sum(not frame.offset for frame in frames)
        return pb.PutResponse(outcomes=[pb.PUT_OUTCOME_STORED] * (num_blocks + 1))


def test_answers_that_do_not_fit_are_failures() -> None:
    keys = keys_of(BLOCKS)
    with client_of(Liar()) as client:
        for call, complaint in (
            (lambda: client.lookup(keys), "4 hits for 3 keys"),
            (lambda: client.contains(keys), "2 answers to 3 keys"),
            (lambda: client.delete(keys), "2 answers to 3 keys"),
            (lambda: client.put(BLOCKS), "4 outcomes for 3 blocks"),
        ):
            with pytest.raises(RpcError, match=complaint):
                call()
        assert client.counters["failed_calls"] == 4


def test_an_answer_before_the_question_is_finished_is_a_failure() -> None:
    class Hasty(stubs.BlockStoreServicer):
        def Put(self, frames: Iterator[pb.BlockFrame], context: object) -> pb.PutResponse:
            return pb.PutResponse(outcomes=[pb.PUT_OUTCOME_STORED] * 2)

    may_go_on = threading.Event()

    def source() -> Iterator[tuple[BlockKey, bytes]]:
        yield BLOCKS[0]
        assert may_go_on.wait(WAIT_S)
        yield BLOCKS[1]

    with client_of(Hasty()) as client:
        with pytest.raises(RpcError, match="answered before it had all blocks"):
            client.put(source())
        may_go_on.set()


def test_a_server_without_our_service_is_a_failure() -> None:
    complaint = r"Ping at 127\.0\.0\.1:\d+: Method not implemented"
    with client_of(stubs.BlockStoreServicer()) as client, pytest.raises(RpcError, match=complaint):
        client.ping()


def test_a_closed_client_raises_rpc_errors() -> None:
    with running_server() as server:
        client = StoreClient(server.address, config=PATIENT)
        client.ping()
        client.close()
        client.close()
        for call in (
            client.ping,
            lambda: client.lookup([sample_key(1)]),
            lambda: list(client.get([sample_key(1)])),
            lambda: client.put([sample_block(1)]),
        ):
            with pytest.raises(RpcError):
                call()


def test_closing_ends_the_wait_of_another_thread() -> None:
    config = ClientConfig(lookup_timeout_s=60.0, backoff_s=30.0, max_attempts=9)
    with ThreadPoolExecutor(1) as thread, StoreClient("127.0.0.1:1", config=config) as client:
        pinging = thread.submit(client.ping)
        wait_until(lambda: client.counters["failed_calls"] > 0)
        client.close()
        with pytest.raises(RpcUnavailable):
            pinging.result(WAIT_S)
        assert client.counters["retries"] == 0


def test_pauses_double_with_jitter_until_the_attempts_are_used_up() -> None:
    config = ClientConfig(backoff_s=1.0, max_attempts=5)
    runs = []
    for _ in range(20):
        attempts = Attempts(config, timeout_s=1000.0)
        pauses = [attempts.next_pause_s() for _ in range(4)]
        assert attempts.next_pause_s() is None
        for number, pause_s in enumerate(pauses):
            assert pause_s is not None
            assert 0.5 <= pause_s / 2**number <= 1.5
        runs.append(pauses)
    assert len({pauses[0] for pauses in runs}) > 1


def test_a_token_does_not_travel_unencrypted_to_another_machine(tmp_path: Path) -> None:
    config = ClientConfig(token_file=write_token(tmp_path))
    with pytest.raises(ConfigError, match=r"unencrypted to 10\.0\.0\.1:7437: set tls_ca, or tls"):
        StoreClient("10.0.0.1:7437", config=config)
    StoreClient("127.0.0.1:7437", config=config).close()
    StoreClient("10.0.0.1:7437", config=ClientConfig(token_file=config.token_file, tls=True)).close()


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pem cannot be read: No such file"):
        StoreClient("127.0.0.1:1", config=ClientConfig(tls_ca=tmp_path / "absent.pem"))


def test_the_address_comes_from_the_argument_or_the_config() -> None:
    config = ClientConfig(address="10.0.0.1:1")
    with (
        StoreClient(config=config) as one,
        StoreClient("10.0.0.2:2", config=config) as two,
        StoreClient() as three,
    ):
        assert [one.address, two.address, three.address] == ["10.0.0.1:1", "10.0.0.2:2", "127.0.0.1:7437"]
