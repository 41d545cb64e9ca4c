"""Blocks in several places: put from there, got there, and never taken for sound where they are not."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from store.running_server import WAIT_S, running_server
from store.sample_blocks import keys_of, sample_block, sample_blocks, sample_key
from store.test_shared import MIB, Calls, answers, client_at, end, start_server

from tq_store.block import HEADER_BYTES, BlockKind, pack_block, pack_header, payload_of, verify_block
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import LengthMismatch, RpcError, RpcTimeout, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome, PutOutcome
from tq_store.rpc import streamed as streamed_module
from tq_store.rpc.connection import Connection, Pending
from tq_store.rpc.frames import Frame
from tq_store.rpc.segment import Segment
from tq_store.runs import runs_of
from tq_store.server import service as service_module

STORED, PRESENT = PutOutcome.STORED, PutOutcome.PRESENT
FILLED, MISSING, UNLIKE = GetOutcome.FILLED, GetOutcome.MISSING, GetOutcome.UNLIKE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(params=["shared", "pipe", "stream"])
def client(request: pytest.FixtureRequest, path: Path) -> Iterator[StoreClient]:
    with running_server(local_socket=path) as server:
        if request.param == "shared":
            with client_at(path) as opened:
                yield opened
        else:
            pipes = 1 if request.param == "pipe" else 0
            config = ClientConfig(transfer_timeout_s=WAIT_S, pipes=pipes)
            with StoreClient(server.address, config=config) as opened:
                yield opened


@pytest.fixture
def near(path: Path) -> Iterator[StoreClient]:
    """A client that shares memory."""
    with running_server(local_socket=path), client_at(path) as opened:
        yield opened


def kind_of(block: bytes) -> BlockKind:
    return BlockKind(verify_block(block))


def placed(block: tuple[BlockKey, bytes], *, sizes: Sequence[int] = (100, 7), filled: bool) -> PlacedBlock:
    """A block cut into pieces of these sizes, and one of the rest."""
    key, data = block
    payload = memoryview(bytearray(payload_of(data)) if filled else bytearray(len(data) - HEADER_BYTES))
    pieces = []
    for size in sizes:
        pieces.append(payload[:size])
        payload = payload[size:]
    return PlacedBlock(key, kind_of(data), [*pieces, payload])


def places_for(blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PlacedBlock]:
    return [placed(block, filled=False) for block in blocks]


def got(client: StoreClient, batches: Sequence[Sequence[PlacedBlock]]) -> list[list[GetOutcome]]:
    keys = [block.key for batch in batches for block in batch]
    return list(client.get_into(keys, batches))


def holds(place: PlacedBlock, block: tuple[BlockKey, bytes]) -> bool:
    return b"".join(place.pieces) == payload_of(block[1])


def test_blocks_go_from_places_to_places(client: StoreClient) -> None:
    blocks = sample_blocks(20, 100_000)
    sent = [placed(block, filled=True) for block in blocks]
    assert client.put_from(sent[:10]) == [STORED] * 10
    assert client.put_from(sent) == [PRESENT] * 10 + [STORED] * 10
    assert [data for _, data in client.get(keys_of(blocks))] == [data for _, data in blocks]
    places = places_for([sample_block(99), *blocks, sample_block(98)])
    assert got(client, [places[:3], places[3:20], [], places[20:]]) == [
        [MISSING, FILLED, FILLED],
        [FILLED] * 17,
        [],
        [FILLED, MISSING],
    ]
    assert all(map(holds, places[1:-1], blocks))
    assert client.put_from([]) == []
    assert set(client.counters.values()) == {0}


def test_a_block_whose_owner_copies_it_at_once_is_copied_so(client: StoreClient) -> None:
    blocks = sample_blocks(5)
    client.put(blocks)
    copied: list[bytes] = []
    places = [
        replace(place, copy=lambda payload: copied.append(bytes(payload))) if number % 2 else place
        for number, place in enumerate(places_for([*blocks, sample_block(99)]))
    ]
    assert got(client, [places]) == [[FILLED] * 5 + [MISSING]]
    assert copied == [payload_of(data) for _, data in blocks[1::2]]
    for number, place in enumerate(places[:5]):
        assert holds(place, blocks[number]) != bool(number % 2)


def test_the_same_places_serve_batch_after_batch(client: StoreClient) -> None:
    blocks = sample_blocks(6, 1000)
    client.put(blocks)
    memory = memoryview(bytearray(1000))

    def batches() -> Iterator[list[PlacedBlock]]:
        for key, data in blocks:
            yield [PlacedBlock(key, kind_of(data), [memory])]

    outcomes = client.get_into(keys_of(blocks), batches())
    for answer, block in zip(outcomes, blocks, strict=True):
        assert answer == [FILLED]
        assert memory == payload_of(block[1])


def test_a_sound_block_of_another_kind_or_length_is_unlike(client: StoreClient) -> None:
    same_length, longer, right = sample_blocks(3, 1000)
    client.put([same_length, sample_block(1, 2000), right])
    kind = kind_of(right[1])
    places = [
        PlacedBlock(key, kind, [memoryview(bytearray(1000))]) for key in keys_of([same_length, longer, right])
    ]
    assert got(client, [places]) == [[UNLIKE, UNLIKE, FILLED]]
    assert client.counters["rejected_blocks"] == 0


def test_a_reader_that_stops_early_is_not_served_further(near: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(4)
    near.put(blocks)
    calls.take()
    outcomes = near.get_into(keys_of(blocks), [places_for(blocks[:2]), places_for(blocks[2:])])
    assert next(outcomes) == [FILLED] * 2
    outcomes.close()
    assert calls.take() == ["GetShared"]


def test_a_batch_takes_one_call_of_each_side(near: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(8, 400_000)
    assert near.put_from([placed(block, filled=True) for block in blocks]) == [STORED] * 8
    assert got(near, [places_for(blocks)]) == [[FILLED] * 8]
    assert calls.take() == ["PutShared", "GetShared"]


def test_more_than_the_segment_holds_takes_several_calls(near: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(5, 2 * MIB - 1000)
    assert near.put_from([placed(block, filled=True) for block in blocks]) == [STORED] * 5
    places = places_for(blocks)
    assert got(near, [places]) == [[FILLED] * 5]
    assert all(map(holds, places, blocks))
    assert calls.take() == ["PutShared"] * 3 + ["GetShared"] * 3


def test_a_block_larger_than_the_segment_goes_as_a_stream(near: StoreClient, calls: Calls) -> None:
    blocks = [sample_block(1), sample_block(2, 5 * MIB), sample_block(3)]
    assert near.put_from([placed(block, filled=True) for block in blocks]) == [STORED] * 3
    assert calls.take() == ["PutShared", "Put"]
    places = places_for(blocks)
    assert got(near, [places[:2], places[2:]]) == [[FILLED] * 2, [FILLED]]
    assert all(map(holds, places, blocks))
    assert "Get" in calls.take()


def test_more_pieces_than_one_system_call_takes(client: StoreClient) -> None:
    block = sample_block(1, 5000)
    assert client.put_from([placed(block, sizes=[2] * 2400, filled=True)]) == [STORED]
    place = placed(block, sizes=[1] * 3000, filled=False)
    assert got(client, [[place]]) == [[FILLED]]
    assert holds(place, block)


@pytest.mark.parametrize("position", [0, 40, 100, 255, 256, 300, 511])
def test_a_bit_that_flips_in_shared_memory_is_a_miss(
    near: StoreClient, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    """In the header, or in the payload."""
    blocks = sample_blocks(3)
    near.put(blocks)
    view, places = Segment.view, iter([512 + position])

    def flipped(segment: Segment) -> AbstractContextManager[memoryview]:
        for place in places:
            segment.write(place, bytes([segment.read(place, 1)[0] ^ 1]))
        return view(segment)

    monkeypatch.setattr(Segment, "view", flipped)
    assert got(near, [places_for(blocks)]) == [[FILLED, MISSING, FILLED]]
    assert near.counters["rejected_blocks"] == 1


@pytest.mark.parametrize("position", [0, 40, 255, 256, 511])
def test_a_bit_that_flips_in_a_stream_is_a_miss(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = sample_blocks(3)
    parse = streamed_module.parse_frame

    def flipped(raw: bytes) -> Frame:
        frame = parse(raw)
        if frame.index != 1:
            return frame
        data = bytearray(frame.data)
        data[position] ^= 1
        return replace(frame, data=memoryview(data))

    with running_server() as server, StoreClient(server.address, config=ClientConfig(pipes=0)) as client:
        client.put(blocks)
        monkeypatch.setattr(streamed_module, "parse_frame", flipped)
        assert got(client, [places_for(blocks)]) == [[FILLED, MISSING, FILLED]]
        assert client.counters["rejected_blocks"] == 1


@pytest.mark.parametrize("copy", ["read_into", "write_from"])
def test_memory_that_cannot_be_copied_leaves_the_ordinary_way(
    near: StoreClient, monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Segment, copy, fail)
    block = sample_block(1)
    assert near.put_from([placed(block, filled=True)]) == [STORED]
    place = placed(block, filled=False)
    assert got(near, [[place]]) == [[FILLED]]
    assert holds(place, block)


def test_a_kernel_that_copies_less_is_noticed(near: StoreClient) -> None:
    with near._segments.lend(WAIT_S) as segment:
        assert segment is not None
        with pytest.raises(OSError, match="could not be copied"):
            segment.read_into(segment.num_bytes - 1, [memoryview(bytearray(2))])


def test_a_server_that_comes_back_is_asked_again(path: Path) -> None:
    blocks = sample_blocks(8, 2 * MIB - 1000)
    server = start_server(path)
    with client_at(path) as client:
        client.put(blocks)
        outcomes = client.get_into(keys_of(blocks), [[place] for place in places_for(blocks)])
        assert next(outcomes) == [FILLED]
        end(server, signal.SIGKILL)
        with pytest.raises(RpcUnavailable):  # what was asked for ahead may have come
            assert all(each == [FILLED] for each in outcomes)
        server = start_server(path)
        while not answers(client):
            pass
        client.put_from([placed(block, filled=True) for block in blocks])
        assert got(client, [places_for(blocks)]) == [[FILLED] * 8]
        assert client.counters["retries"] > 0
    end(server, signal.SIGTERM)


def test_what_was_filled_before_a_failure_is_handed_over(
    near: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = sample_blocks(4, 2 * MIB - 1000)
    near.put(blocks)
    answer, answers = Pending.answer, []

    def failing(pending: "Pending[list[int]]") -> list[int]:
        answers.append(pending)
        if len(answers) == 2:
            raise RpcTimeout("too late")
        return answer(pending)

    monkeypatch.setattr(Pending, "answer", failing)
    places = places_for(blocks)
    outcomes = near.get_into(keys_of(blocks), [places])
    assert next(outcomes) == [FILLED, FILLED, MISSING, MISSING]
    assert all(map(holds, places[:2], blocks))
    with pytest.raises(RpcTimeout, match="too late"):
        next(outcomes)


def test_all_batches_have_one_deadline(near: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = sample_blocks(3, 3 * MIB)
    near.put(blocks)
    left_s: list[float] = []
    start = Connection.start

    def noting(connection: Connection, method: str, *arguments: Any, **named: Any) -> Any:
        left_s.append(named["timeout_s"])
        return start(connection, method, *arguments, **named)

    monkeypatch.setattr(Connection, "start", noting)
    assert got(near, [[place] for place in places_for(blocks)]) == [[FILLED]] * 3
    assert WAIT_S > left_s[0] > left_s[1] > left_s[2] > 0


def test_nothing_in_places_is_read_after_a_put_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller gives them to others then; a stream is read for a while longer."""
    later: list[Iterator[bytes]] = []

    def lost(_: Connection, __: str, requests: Iterator[bytes], ___: Callable[..., Any], **____: Any) -> Any:
        later.append(requests)
        raise RpcError("lost")

    monkeypatch.setattr(Connection, "send", lost)
    block = sample_block(1, 1000)
    place = placed(block, filled=True)
    with StoreClient("127.0.0.1:1") as client, pytest.raises(RpcError, match="lost"):
        client.put_from([place])
    for piece in place.pieces:
        piece[:] = bytes(len(piece))
    assert bytes(payload_of(block[1])) in b"".join(later[0])


def test_a_server_with_a_small_window_copies_a_few_blocks_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = sample_blocks(6, 1000)
    groups: list[int] = []
    cut = service_module.runs_of

    def noting(*arguments: Any, **limits: int) -> Iterator[Sequence[tuple[BlockKey, int]]]:
        for group in cut(*arguments, **limits):
            groups.append(len(group))
            yield group

    monkeypatch.setattr(service_module, "runs_of", noting)
    limits = {"max_inflight_bytes": 6000, "max_outflight_bytes": 8000}
    with running_server(local_socket=path, **limits) as server, client_at(path) as client:
        assert server.address
        assert client.put_from([placed(block, filled=True) for block in blocks]) == [STORED] * 6
        assert got(client, [places_for(blocks)]) == [[FILLED] * 6]
    assert groups == [2] * 3


def test_runs_keep_both_limits() -> None:
    blocks, size_of = places_for(sample_blocks(7, 744)), attrgetter("num_bytes")
    assert [len(run) for run in runs_of(blocks, size_of, most_bytes=3000, most_items=9)] == [3, 3, 1]
    assert [len(run) for run in runs_of(blocks, size_of, most_bytes=9000, most_items=2)] == [2, 2, 2, 1]
    assert [len(run) for run in runs_of(blocks, size_of, most_bytes=1, most_items=9)] == [1] * 7
    assert list(runs_of([], size_of, most_bytes=1, most_items=1)) == []


@pytest.mark.parametrize("payload_bytes", [256, 200_000, 3 * MIB])
def test_a_kind_makes_the_headers_of_its_blocks(payload_bytes: int) -> None:
    key, block = sample_block(1, payload_bytes)
    info, payload = verify_block(block), payload_of(block)
    kind = BlockKind(info)
    pieces = [payload[:10], payload[10:100], payload[100:100], payload[100:]]
    assert kind.pack_header(key, pieces) == block[:HEADER_BYTES] == pack_header(info, payload)
    assert kind.pack_header(sample_key(9), [payload]) != block[:HEADER_BYTES]
    assert pack_block(info, payload) == block
    with pytest.raises(LengthMismatch, match="its geometry says"):
        kind.pack_header(key, pieces[1:])
