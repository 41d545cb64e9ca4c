"""Pages from an engine's blocks to a real server and back, and what happens when that fails."""

import threading
import time

import pytest
import torch
from connectors.vllm.rows_of import facts, heads, page_layout
from store.running_server import running_server, wait_until

from tq_connectors.vllm.chunk_codec import CopiedChunks
from tq_connectors.vllm.page_mover import PageMover
from tq_connectors.vllm.page_moves import PageMove, RequestMoves, StepMoves
from tq_connectors.vllm.plan import plan_offload
from tq_connectors.vllm.settings import StoreSettings
from tq_connectors.vllm.store_pages import rank_cache
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcTimeout
from tq_store.keys import BlockKey

LAYOUT = page_layout(2)
QUICK = ClientConfig(connect_timeout_s=0.3, lookup_timeout_s=0.3, transfer_timeout_s=0.5)


def plan(tp_size: int = 1):
    packed = {"dtype": "tq4", "block_tokens": (64,), "blocks_per_chunk": 1}
    size = 2 * LAYOUT.page_bytes // tp_size
    return plan_offload(
        facts(**packed, block_bytes=size, tp_size=tp_size, world_size=tp_size),
        StoreSettings(revision="r"),
        heads(),
    )


def key(number: int) -> BlockKey:
    return BlockKey(bytes([number]) * 64)


def moves_of(request_id: str, pages: dict[int, int], *, saves: bool = False, held: bool = False) -> StepMoves:
    """Pages by number, and the block of each."""
    moved = RequestMoves(request_id, tuple(PageMove(key(page), (block,)) for page, block in pages.items()))
    return StepMoves([] if saves else [moved], [moved] if saves else [], [request_id] if held else [])


class Rank:
    """One rank's device: blocks of two layers of packed pages."""

    def __init__(
        self,
        client: StoreClient,
        rank: int = 0,
        tp_size: int = 1,
        host_pages: int = 2,
        load_timeout_s: float = 30.0,
        load_threads: int = 1,
    ) -> None:
        planned = plan(tp_size)
        size = planned.rows.rank_layout.page_bytes
        generator = torch.Generator().manual_seed(rank + 1)
        self.layers = [
            torch.randint(0, 256, (12, size), dtype=torch.uint8, generator=generator).view(torch.int8)
            for _ in range(2)
        ]
        codec = CopiedChunks(self.layers, blocks_per_chunk=1)
        self.cache = rank_cache(client, planned, rank=rank, most_ranks=2)
        self.mover = PageMover(
            self.cache,
            codec,
            staging_bytes=codec.cell_bytes,
            host_bytes=host_pages * codec.cell_bytes,
            load_threads=load_threads,
            load_timeout_s=load_timeout_s,
        )

    def finished(self, is_there):
        """What was finished, once something was."""
        found = []

        def look() -> bool:
            found.append(self.mover.take_finished())
            return is_there(found[-1])

        wait_until(look)
        return found[-1]


@pytest.fixture
def client():
    with running_server() as server, StoreClient(server.address) as made:
        yield made


def test_what_one_saves_another_loads_into_other_blocks(client):
    writer, reader = Rank(client), Rank(client, rank=0)
    for layer in reader.layers:
        layer.zero_()
    writer.mover.save(moves_of("w", {1: 3, 2: 4, 3: 5}, saves=True, held=True))
    writer.mover.wait_for_saves()
    assert writer.finished(lambda found: found[0])[0] == {"w"}
    assert writer.cache.saves.flush(10)
    reader.mover.start(moves_of("r", {1: 9, 2: 8, 3: 7}))
    _, received, failed = reader.finished(lambda found: found[1])
    assert (received, failed) == ({"r"}, set())
    for mine, theirs in zip(reader.layers, writer.layers, strict=True):
        assert torch.equal(mine[[9, 8, 7]], theirs[[3, 4, 5]])
    writer.mover.close()
    reader.mover.close()


def test_two_ranks_save_and_one_loads(client):
    ranks = [Rank(client, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.mover.save(moves_of("w", {1: 3}, saves=True))
        rank.mover.wait_for_saves()
        assert rank.cache.saves.flush(10)
    whole = Rank(client)
    assert whole.cache.lookup([key(1), key(2)]) == 1
    whole.mover.start(moves_of("r", {1: 6}))
    assert whole.finished(lambda found: found[1])[2] == set()
    section = LAYOUT.section_bytes
    for number, layer in enumerate(whole.layers):
        assert torch.equal(layer[6][:section], ranks[0].layers[number][3])
        assert torch.equal(layer[6][section:], ranks[1].layers[number][3])
    for each in (*ranks, whole):
        each.mover.close()


def test_pages_after_one_that_is_missing_are_blocks_that_were_not_filled(client):
    rank = Rank(client)
    rank.mover.save(moves_of("w", {1: 3, 3: 5}, saves=True))
    rank.mover.wait_for_saves()
    assert rank.cache.saves.flush(10)
    rank.mover.start(moves_of("r", {1: 9, 2: 8, 3: 7}))
    _, received, failed = rank.finished(lambda found: found[1])
    assert (received, failed) == ({"r"}, {8, 7})
    rank.mover.close()


def save(rank: Rank, pages: dict[int, int]) -> None:
    rank.mover.save(moves_of("w", pages, saves=True))
    rank.mover.wait_for_saves()
    assert rank.cache.saves.flush(10)
    rank.mover.take_finished()


def gated(monkeypatch, rank: Rank, gates: dict[int, threading.Event]) -> list[list[BlockKey]]:
    """Hold loads back that ask for these pages until their gates open; gives the keys of all loads."""
    load, asked = rank.cache.load, []

    def held_back(keys):
        asked.append(list(keys))
        for number, gate in gates.items():
            assert key(number) not in keys or gate.wait(10)
        return load(keys)

    monkeypatch.setattr(rank.cache, "load", held_back)
    return asked


@pytest.mark.parametrize(("host_pages", "load_threads"), [(1, 4), (5, 2), (9, 3), (64, 4)])
def test_many_pages_come_by_parts_and_go_where_they_belong(client, host_pages, load_threads):
    writer, reader = Rank(client, host_pages=11), Rank(client, 0, 1, host_pages, load_threads=load_threads)
    save(writer, {number: number for number in range(1, 12)})
    for layer in reader.layers:
        layer.zero_()
    reader.mover.start(moves_of("r", {number: 12 - number for number in range(1, 12)}))
    assert reader.finished(lambda found: found[1])[1:] == ({"r"}, set())
    for mine, theirs in zip(reader.layers, writer.layers, strict=True):
        assert torch.equal(mine[1:], theirs[1:].flip(0))
    assert reader.cache.counters.loaded_pages == 11
    writer.mover.close()
    reader.mover.close()


def test_pages_that_are_here_are_moved_while_others_are_on_their_way(client, monkeypatch):
    rank, gate = Rank(client, host_pages=4, load_threads=2), threading.Event()
    save(rank, {1: 3, 2: 4})
    asked = gated(monkeypatch, rank, {2: gate})
    rank.layers[1][8].zero_()
    rank.mover.start(moves_of("r", {1: 8, 2: 9}))
    wait_until(lambda: torch.equal(rank.layers[1][8], rank.layers[1][3]))
    assert rank.mover.take_finished()[1] == set(), "the other page is not there yet"
    gate.set()
    assert rank.finished(lambda found: found[1])[1:] == ({"r"}, set())
    assert sorted(asked) == [[key(1)], [key(2)]]
    rank.mover.close()


def test_after_a_page_that_is_missing_nothing_is_asked_for_and_nothing_written(client, monkeypatch):
    rank, missing, gate = Rank(client, host_pages=2, load_threads=2), threading.Event(), threading.Event()
    save(rank, {1: 3, 3: 4, 5: 5, 6: 6})
    asked = gated(monkeypatch, rank, {2: missing, 3: gate})
    rank.mover.start(moves_of("r", {1: 11, 2: 10, 3: 9, 5: 8, 6: 7}))
    wait_until(lambda: [key(3)] in asked)
    missing.set()
    assert rank.mover.take_finished()[1] == set(), "memory is still being written"
    gate.set()
    assert rank.finished(lambda found: found[1])[1:] == ({"r"}, {10, 9, 8, 7})
    assert sorted(asked) == [[key(1)], [key(2)], [key(3)]]
    rank.mover.close()


def test_without_a_store_a_load_ends_and_fills_nothing():
    with StoreClient("127.0.0.1:1", config=QUICK) as client:
        rank = Rank(client)
        assert rank.cache.lookup([key(1)]) == 0
        rank.mover.start(moves_of("r", {1: 9, 2: 8}))
        assert rank.finished(lambda found: found[1])[2] == {8, 9}
        rank.mover.close()


def test_what_waits_for_too_long_is_dropped_and_nothing_is_held_for_it(client, monkeypatch):
    rank = Rank(client, host_pages=1)
    may_go = threading.Event()
    saved = rank.cache.save
    monkeypatch.setattr(rank.cache, "save", lambda *page: may_go.wait(10) and saved(*page))
    rank.mover.save(moves_of("a", {1: 3, 2: 4}, saves=True))
    rank.mover.save(moves_of("b", {3: 5}, saves=True, held=True))
    assert rank.mover.dropped_pages == 1
    assert rank.mover.take_finished()[0] == {"b"}
    may_go.set()
    rank.mover.wait_for_saves()
    rank.mover.close()


def test_of_a_request_that_is_too_large_the_first_pages_are_saved(client):
    rank = Rank(client, host_pages=1)
    rank.mover.save(moves_of("w", {1: 3, 2: 4, 3: 5, 4: 6}, saves=True))
    assert rank.mover.dropped_pages == 2
    rank.mover.wait_for_saves()
    assert rank.cache.saves.flush(10)
    assert rank.cache.lookup([key(number) for number in range(1, 5)]) == 2
    rank.mover.close()


def test_a_load_whose_turn_comes_late_asks_for_nothing(client, monkeypatch):
    rank = Rank(client, load_timeout_s=0.1)
    may_go, asked = threading.Event(), []

    def load(keys):
        asked.append(keys)
        assert may_go.wait(10)
        return iter(())

    monkeypatch.setattr(rank.cache, "load", load)
    late_at = time.monotonic() + 0.2
    rank.mover.start(moves_of("a", {1: 9}))
    rank.mover.start(moves_of("b", {2: 8}))
    wait_until(lambda: time.monotonic() > late_at)
    may_go.set()
    received, failed = set(), set()

    def have_ended(found) -> bool:
        received.update(found[1])
        failed.update(found[2])
        return received == {"a", "b"}

    rank.finished(have_ended)
    assert failed == {8, 9}
    assert asked == [[key(1)]]
    rank.mover.close()


def test_parts_of_a_load_whose_turn_comes_late_ask_for_nothing(client, monkeypatch):
    rank, gate = Rank(client, host_pages=2, load_threads=1, load_timeout_s=0.2), threading.Event()
    save(rank, {1: 3, 2: 4})
    asked = gated(monkeypatch, rank, {1: gate})
    rank.mover.start(moves_of("r", {1: 8, 2: 9}))
    late_at = time.monotonic() + 0.2
    wait_until(lambda: time.monotonic() > late_at)
    gate.set()
    assert rank.finished(lambda found: found[1])[1:] == ({"r"}, {9})
    assert asked == [[key(1)]]
    rank.mover.close()


def test_a_load_of_no_pages_ends(client, caplog):
    rank = Rank(client)
    rank.mover.start(moves_of("r", {}))
    assert rank.finished(lambda found: found[1]) == (set(), {"r"}, set())
    assert not caplog.records
    rank.mover.close()


def test_after_the_end_loads_fill_nothing_and_saves_are_dropped(client):
    rank = Rank(client)
    rank.mover.close()
    rank.mover.start(moves_of("r", {1: 9}))
    rank.mover.save(moves_of("w", {1: 3}, saves=True, held=True))
    assert rank.mover.take_finished() == ({"w"}, {"r"}, {9})
    assert rank.mover.dropped_pages == 1


def test_a_store_that_fails_is_left_alone_and_found_again(client, monkeypatch):
    rank = Rank(client)
    rank.mover.save(moves_of("w", {1: 3}, saves=True))
    rank.mover.wait_for_saves()
    assert rank.cache.saves.flush(10)
    asked = []

    def broken(keys):
        asked.append(keys)
        raise RpcTimeout("too late")

    with monkeypatch.context() as outage:
        outage.setattr(client, "lookup", broken)
        assert [rank.cache.lookup([key(1)]) for _ in range(5)] == [0] * 5
        assert list(rank.cache.load([key(1)])) == []
    assert len(asked) == 1
    wait_until(lambda: rank.cache.lookup([key(1)]) == 1)
    assert len(list(rank.cache.load([key(1)]))) == 1

    def lost(keys):
        raise RpcTimeout("lost on the way")
        yield

    monkeypatch.setattr(client, "get", lost)
    assert list(rank.cache.load([key(1)])) == []
    assert rank.cache.lookup([key(1)]) == 0
    rank.mover.close()


def test_whatever_breaks_is_a_miss_and_not_an_exception(client, monkeypatch, caplog):
    rank = Rank(client)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(rank.cache, "load", broken)
    monkeypatch.setattr(rank.cache, "save", broken)
    rank.mover.start(moves_of("r", {1: 9}))
    assert rank.finished(lambda found: found[1])[2] == {9}
    rank.mover.save(moves_of("w", {1: 3}, saves=True, held=True))
    assert rank.finished(lambda found: found[0])[0] == {"w"}
    assert "loading pages failed" in caplog.text
    assert "saving pages failed" in caplog.text
    rank.mover.close()


def test_a_device_that_fails_saves_and_loads_nothing(client, monkeypatch):
    rank = Rank(client)
    rank.mover.save(moves_of("w", {1: 3}, saves=True))
    rank.mover.wait_for_saves()
    assert rank.cache.saves.flush(10)

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(CopiedChunks, "save", broken)
    monkeypatch.setattr(CopiedChunks, "load", broken)
    rank.mover.save(moves_of("w", {2: 3}, saves=True))
    rank.mover.wait_for_saves()
    assert rank.cache.lookup([key(2)]) == 0
    rank.mover.start(moves_of("r", {1: 9}))
    assert rank.finished(lambda found: found[1])[2] == {9}
    rank.mover.close()


def test_blocks_that_cannot_be_moved_stop_the_start(client, monkeypatch):
    monkeypatch.delattr(CopiedChunks, "save")
    with pytest.raises(ConfigError, match="cannot be moved"):
        Rank(client)


def test_a_cache_of_other_bytes_has_no_pages(client):
    raw = plan_offload(facts(dtype="fp8"), StoreSettings(revision="r"), heads())
    with pytest.raises(ConfigError, match="TQStoreTier"):
        rank_cache(client, raw, rank=0, most_ranks=0)
