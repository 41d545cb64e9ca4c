"""Blocks that are asked for ahead, into a second segment, and what becomes of one that nobody waits for."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import keys_of, sample_blocks, sample_key
from store.test_placed import FILLED, MISSING, got, holds, places_for
from store.test_shared import MIB, Calls, client_at

from tq_store.client import StoreClient
from tq_store.errors import RpcError, RpcOverLimit, RpcTimeout
from tq_store.rpc import shared_reader
from tq_store.rpc.connection import Connection, Pending
from tq_store.rpc.segment import Segment
from tq_store.server.segments import Segment as ServerSegment

BLOCK_BYTES = 2 * MIB - 1000
"""Two of these fill a segment of `client_at`."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def client(path: Path) -> Iterator[StoreClient]:
    with running_server(local_socket=path), client_at(path) as opened:
        yield opened


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


class HeldWrites:
    """The server's writes into segments, from the second on held back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = 0
        self.may_go_on, self.fails = False, False
        write = ServerSegment.write

        async def held(segment: ServerSegment, offset: int, pieces: Sequence[bytes]) -> None:
            self.num_begun += 1
            if self.num_begun > 1:
                while not self.may_go_on:
                    await asyncio.sleep(0.001)
                if self.fails and self.num_begun == 2:
                    raise ValueError("no more")
            await write(segment, offset, pieces)

        monkeypatch.setattr(ServerSegment, "write", held)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> HeldWrites:
    return HeldWrites(monkeypatch)


def idle(client: StoreClient) -> list[Segment]:
    return client._segments._idle


def test_the_server_fills_one_segment_while_another_is_copied(client: StoreClient) -> None:
    blocks = sample_blocks(6, BLOCK_BYTES)
    client.put(blocks)
    served: list[int] = []

    def num_served() -> int:
        return client.stats().counters["hits_memory"]

    def copy(_: memoryview) -> None:
        wait_until(lambda: num_served() >= min(6, 4 + len(served) // 2 * 2))
        served.append(num_served())

    places = [replace(place, copy=copy) for place in places_for(blocks)]
    assert got(client, [places]) == [[FILLED] * 6]
    assert served[0] == served[1] == 4
    assert len(idle(client)) == 2


def test_answers_and_batches_may_end_in_different_places(client: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(20, 500_000)
    client.put(blocks)
    calls.take()
    places = places_for([*blocks[:9], *sample_blocks(1, 500_000, first=99), *blocks[9:]])
    batches = [places[:1], places[1:11], [], places[11:12], places[12:]]
    outcomes = [outcome for each in got(client, batches) for outcome in each]
    assert outcomes == [FILLED] * 9 + [MISSING] + [FILLED] * 11
    assert all(map(holds, places[:9] + places[10:], blocks))
    assert calls.take() == ["GetShared"] * 3, "seven blocks each"


def test_a_shorter_answer_than_expected_is_followed_by_what_is_missing(client: StoreClient) -> None:
    blocks = [*sample_blocks(1, MIB), *sample_blocks(7, 3 * MIB - 1000, first=1)]
    client.put(blocks)
    places = places_for(blocks)
    assert got(client, [places[:2], places[2:]]) == [[FILLED] * 2, [FILLED] * 6]
    assert all(map(holds, places, blocks))
    assert set(client.counters.values()) == {0}


def test_a_segment_that_is_being_written_is_lent_to_nobody(client: StoreClient, writes: HeldWrites) -> None:
    blocks = sample_blocks(4, BLOCK_BYTES)
    client.put(blocks)
    outcomes = client.get_into(keys_of(blocks), [places_for(blocks[:2]), places_for(blocks[2:])])
    assert next(outcomes) == [FILLED] * 2
    outcomes.close()
    (first,) = idle(client)
    with client._segments.lend(WAIT_S) as lent, client._segments.lend(WAIT_S) as another:
        assert lent is first
        assert another is not None
        writes.may_go_on = True
        wait_until(lambda: len(idle(client)) == 1)
        assert idle(client)[0] not in (lent, another)
        assert idle(client)[0].is_alive
    assert got(client, [places_for(blocks)]) == [[FILLED] * 4]


def test_a_segment_whose_call_fails_is_given_up(client: StoreClient, writes: HeldWrites) -> None:
    blocks = sample_blocks(4, BLOCK_BYTES)
    client.put(blocks)
    outcomes = client.get_into(keys_of(blocks), [places_for(blocks[:2]), places_for(blocks[2:])])
    assert next(outcomes) == [FILLED] * 2
    writes.may_go_on = writes.fails = True
    assert next(outcomes) == [FILLED] * 2, "they come as a stream"
    outcomes.close()
    assert len(idle(client)) == 1


def test_an_answer_that_is_late_leaves_its_segment_to_the_server(path: Path, writes: HeldWrites) -> None:
    blocks = sample_blocks(6, BLOCK_BYTES)
    with running_server(local_socket=path), client_at(path) as patient:
        patient.put(blocks)
        with client_at(path, transfer_timeout_s=2.0) as client:
            outcomes = client.get_into(keys_of(blocks), [[place] for place in places_for(blocks)])
            assert [next(outcomes), next(outcomes)] == [[FILLED]] * 2
            wait_until(lambda: writes.num_begun == 2)
            with pytest.raises(RpcTimeout):
                next(outcomes)
            outcomes.close()
            assert idle(client) == []
            writes.may_go_on = True
            assert got(client, [places_for(blocks)]) == [[FILLED] * 6]
            wait_until(lambda: len(idle(client)) == 2)


def test_closing_ends_what_was_asked_for_ahead(client: StoreClient, writes: HeldWrites) -> None:
    blocks = sample_blocks(4, BLOCK_BYTES)
    client.put(blocks)
    outcomes = client.get_into(keys_of(blocks), [places_for(blocks[:2]), places_for(blocks[2:])])
    assert next(outcomes) == [FILLED] * 2
    reader = outcomes.gi_frame.f_locals["shared"]
    segments = [answer._segment for answer in reader._answers]
    assert len(segments) == 2
    outcomes.close()
    client.close()
    wait_until(lambda: all(segment._file.closed for segment in segments))
    writes.may_go_on = True


def test_a_call_that_cannot_be_made_gives_its_segment_up(client: StoreClient) -> None:
    blocks = sample_blocks(1)
    client.put(blocks)
    assert len(idle(client)) == 1
    client._connection.close()
    with pytest.raises(RpcError, match="closed channel"):
        got(client, [places_for(blocks)])
    assert idle(client) == []


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_server_that_takes_one_call_at_once_is_asked_for_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    blocks = sample_blocks(6, BLOCK_BYTES)
    pending: list[Any] = []
    start, write = Connection.start, ServerSegment.write

    def noting(*arguments: Any, **named: Any) -> Any:
        pending.append(start(*arguments, **named))
        return pending[-1]

    async def held(*arguments: Any) -> None:
        while len(pending) < 2 or (at_once == 1 and not pending[1]._call.done()):
            await asyncio.sleep(0.001)
        await write(*arguments)

    with running_server(local_socket=path, max_concurrent_calls=at_once), client_at(path) as client:
        client.put(blocks)
        monkeypatch.setattr(Connection, "start", noting)
        monkeypatch.setattr(ServerSegment, "write", held)
        places = places_for(blocks)
        assert got(client, [places]) == [[FILLED] * 6]
        assert all(map(holds, places, blocks))
        assert client.counters["failed_calls"] == 2 - at_once
        assert len(idle(client)) == at_once


def test_a_server_that_takes_no_call_is_asked_no_more(client: StoreClient) -> None:
    blocks = sample_blocks(6, BLOCK_BYTES)
    client.put(blocks)

    def refuse(_: Any) -> None:
        raise RpcOverLimit("no more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pending, "answer", refuse)
        with pytest.raises(RpcOverLimit):
            got(client, [places_for(blocks)])
    assert got(client, [places_for(blocks)]) == [[FILLED] * 6]


def test_many_threads_ask_ahead(client: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reader, "_BYTES_PER_CALL", 200_000)
    blocks = sample_blocks(40, 50_000)
    client.put(blocks)

    def use(turn: int) -> bool:
        part = blocks[turn % 3 :]
        places = places_for(part)
        (outcomes,) = got(client, [places])
        return outcomes == [FILLED] * len(part) and all(map(holds, places, part))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(48)))
    assert len(idle(client)) <= 16
    assert got(client, [places_for(sample_blocks(1, first=77))]) == [[MISSING]]
    assert client.contains([sample_key(1)]) == [True]
