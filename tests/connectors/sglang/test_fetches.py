"""Pages on their way to requests: here in time, bounded in memory, and a miss when they are not."""

import threading
import time
from collections.abc import Iterator

import pytest
from connectors.sglang.saved_pages import HASHES, PLACE, SETTINGS, page_at, pool_of, save
from store.running_server import wait_until

from tq_connectors.sglang.fetches import Fetches
from tq_connectors.sglang.page_setup import open_page_store
from tq_connectors.sglang.page_store import PageStore
from tq_store.client import StoreClient

PAGE_BYTES = pool_of().shape.page_bytes


class Gate:
    """Holds a client's answers to gets until it is opened."""

    def __init__(self, client: StoreClient) -> None:
        self._get = client.get
        self.is_asked, self.is_open = threading.Event(), threading.Event()
        client.get = self.get  # type: ignore[method-assign]

    def get(self, keys):
        self.is_asked.set()
        self.is_open.wait(10)
        yield from self._get(keys)


def slow_down(client: StoreClient, page_s: float) -> None:
    """Every page takes so long."""
    get = client.get

    def slowly(keys):
        for found in get(keys):
            threading.Event().wait(page_s)
            yield found

    client.get = slowly  # type: ignore[method-assign]


@pytest.fixture
def store(client: StoreClient) -> PageStore:
    """A store with four pages."""
    return save(client, pool_of(seed=1))


def fetches_of(store: PageStore, max_pages: int, wait_s: float = 10) -> Fetches:
    return Fetches(
        store,
        page_bytes=PAGE_BYTES,
        num_layers=store.num_layers,
        budget_bytes=max_pages * PAGE_BYTES,
        wait_s=wait_s,
        num_threads=1,
        pinned=False,
    )


def wait_until_fetched(fetches: Fetches) -> None:
    """One thread fetches, so this comes behind all that was begun."""
    fetches._threads.submit(lambda: None).result(10)


@pytest.fixture
def fetches(store: PageStore) -> Iterator[Fetches]:
    assert store.stored_page_bytes == PAGE_BYTES
    made = fetches_of(store, 4)
    yield made
    made.close()


def test_pages_that_were_promised_are_here(fetches, store):
    assert fetches.begin("a", HASHES) == 4
    stored = fetches.take("a", HASHES)
    pages = pool_of(seed=1)
    assert stored.shape == (2, 4, PAGE_BYTES // 2)
    packed = store.codec.pack([page_at(pages)(place) for place in range(4)])
    assert (stored.transpose(0, 1).flatten(1) == packed).all()
    assert fetches.take("a", HASHES) is None  # taken once


def test_a_request_may_take_fewer_pages_than_it_was_promised(fetches):
    """Others have computed the first page meanwhile, or memory on the device was short."""
    assert fetches.begin("a", HASHES) == 4
    assert fetches.begin("a", HASHES[1:]) == 3
    assert fetches.take("a", HASHES[1:3]).shape == (2, 2, PAGE_BYTES // 2)


def test_the_store_is_asked_once_about_a_request(fetches, client, monkeypatch):
    asked = []
    lookup = client.lookup
    monkeypatch.setattr(client, "lookup", lambda keys: asked.append(keys) or lookup(keys))
    for _ in range(3):
        assert fetches.begin("a", HASHES) == 4
        assert fetches.begin("b", ["unknown"]) == 0
    assert len(asked) == 2


def test_requests_that_the_store_has_nothing_for_are_forgotten(fetches, monkeypatch):
    now_s = time.monotonic()
    for second in range(3):
        monkeypatch.setattr(time, "monotonic", lambda second=second: now_s + second)
        for number in range(100):
            assert fetches.begin(f"{second} {number}", ["unknown"]) == 0
        assert len(fetches._asked_s) == 100
    assert not fetches._fetches


def test_a_request_that_has_changed_is_looked_up_anew(fetches):
    assert fetches.begin("a", HASHES[:2]) == 2
    assert fetches.begin("a", HASHES[2:]) == 2
    assert fetches.take("a", HASHES[2:]) is not None


def test_what_nobody_promised_is_a_miss(fetches):
    assert fetches.take("a", HASHES) is None
    assert fetches.begin("a", HASHES[:2]) == 2
    assert fetches.take("a", ["other"]) is None


def test_pages_that_are_late_are_a_miss_and_cost_no_more_than_the_wait(store, client):
    gate, fetches = Gate(client), fetches_of(store, 4, wait_s=0.2)
    assert fetches.begin("a", HASHES) == 4
    started = time.monotonic()
    assert fetches.take("a", HASHES) is None
    assert 0.1 < time.monotonic() - started < 5
    gate.is_open.set()
    fetches.close()


def test_of_a_prefix_that_is_too_long_for_the_wait_the_head_is_found(store, client):
    slow_down(client, page_s=0.2)
    fetches = fetches_of(store, 8, wait_s=0.5)
    assert fetches.begin("first", HASHES) == 4  # nothing is known of the store's pace
    assert fetches.take("first", HASHES) is None
    fetches._rests_until_s = time.monotonic()
    assert fetches.begin("second", HASHES) == 1
    assert fetches.take("second", HASHES[:1]) is not None
    assert fetches.late_fetches == 1
    assert fetches.begin("third", HASHES) == 1
    wait_until(lambda: fetches._fetches["third"].num_here >= 2)  # while it waits for its turn, more arrive
    assert fetches.begin("third", HASHES) >= 3
    wait_until_fetched(fetches)
    assert fetches.begin("third", HASHES[1:]) == 3
    assert fetches.take("third", HASHES[1:]) is not None
    fetches.close()


def test_a_request_that_may_not_wait_finds_what_is_here(store):
    fetches = fetches_of(store, 4, wait_s=0)
    assert fetches.begin("a", HASHES) == 0
    wait_until_fetched(fetches)
    assert fetches.begin("a", HASHES) == 4
    assert fetches.take("a", HASHES) is not None
    fetches.close()


def test_more_is_promised_when_pages_come_faster(fetches):
    fetches._pages_per_s = 0.1
    for rid, expected in (("a", 1), ("b", 4)):
        assert fetches.begin(rid, HASHES) == expected
        wait_until_fetched(fetches)
        assert fetches.take(rid, HASHES[:expected]) is not None


def test_once_pages_were_late_no_request_waits_for_a_while(store, client, monkeypatch, caplog):
    gate, fetches, asked = Gate(client), fetches_of(store, 4, wait_s=0.01), []
    lookup = client.lookup
    monkeypatch.setattr(client, "lookup", lambda keys: asked.append(keys) or lookup(keys))
    assert fetches.begin("a", HASHES[:2]) == 2
    assert fetches.begin("b", HASHES[:2]) == 2
    for rid in ("a", "b"):
        assert fetches.take(rid, HASHES[:2]) is None
    assert fetches.begin("c", HASHES) == 0
    assert (len(asked), fetches.late_fetches) == (2, 2)
    assert caplog.text.count("pages from the store are late") == 1
    gate.is_open.set()
    wait_until_fetched(fetches)
    assert fetches.begin("c", HASHES) == 0  # what is late has come, and so would the next
    fetches._rests_until_s = time.monotonic()
    assert fetches.begin("c", HASHES) == 1
    wait_until_fetched(fetches)
    assert fetches.begin("c", HASHES) == 4
    assert fetches.take("c", HASHES) is not None
    assert fetches.late_fetches == 2


def test_a_page_that_is_gone_is_a_miss(fetches, client, store):
    gate = Gate(client)
    assert fetches.begin("a", HASHES) == 4
    client.delete(store._names.keys(HASHES[2:3], store._names.saved_parts))
    gate.is_open.set()
    assert fetches.take("a", HASHES) is None
    assert fetches.begin("a", HASHES) == 2  # asked again, as that fetch is forgotten


def test_a_fetch_that_failed_promises_nothing(fetches, client, store):
    gate = Gate(client)
    assert fetches.begin("a", HASHES) == 4
    client.delete(store._names.keys(HASHES[:1], store._names.saved_parts))
    gate.is_open.set()
    wait_until_fetched(fetches)
    assert fetches.begin("a", HASHES) == 0


def test_newer_requests_get_the_memory_of_those_that_did_not_take_theirs(fetches):
    assert fetches.begin("a", HASHES) == 4
    wait_until_fetched(fetches)
    assert fetches.begin("b", HASHES[:3]) == 3
    assert fetches.take("a", HASHES) is None
    assert fetches.begin("c", HASHES[:1]) == 1
    assert fetches.take("b", HASHES[:3]) is not None
    assert fetches.take("c", HASHES[:1]) is not None


def test_no_more_is_promised_than_there_is_memory_for(store):
    small = fetches_of(store, 2)
    assert small.begin("a", HASHES) == 2
    assert small.take("a", HASHES[:2]) is not None
    small.close()


def test_a_fetch_that_was_forgotten_is_not_made(fetches, client, store):
    gate = Gate(client)
    assert fetches.begin("a", HASHES[:2]) == 2
    assert fetches.begin("b", HASHES[:2]) == 2
    gate.is_asked.wait(10)
    fetches.clear()
    gate.is_open.set()
    wait_until_fetched(fetches)
    assert store.counters.loaded_pages == 1  # of a, which was under way


def test_a_fetch_keeps_its_memory_until_it_has_stopped(fetches, client):
    gate = Gate(client)
    assert fetches.begin("a", HASHES[:3]) == 3
    gate.is_asked.wait(10)
    assert fetches.begin("b", HASHES) == 1  # a's pages are arriving, so it is not given up either
    assert fetches.begin("c", HASHES) == 1
    fetches.clear()
    assert fetches.begin("d", HASHES) == 1
    gate.is_open.set()
    wait_until_fetched(fetches)
    assert fetches.begin("e", HASHES) == 4


def test_a_fetch_takes_no_memory_before_its_turn(fetches, client):
    gate = Gate(client)
    assert fetches.begin("a", HASHES[:2]) == 2
    assert fetches.begin("b", HASHES[:2]) == 2
    gate.is_asked.wait(10)
    assert [each.memory is None for each in fetches._fetches.values()] == [False, True]
    gate.is_open.set()
    for rid in ("a", "b"):
        assert fetches.take(rid, HASHES[:2]) is not None


def test_memory_that_was_taken_is_counted_no_more(fetches):
    for rid in ("a", "b"):
        assert fetches.begin(rid, HASHES) == 4
        assert fetches.take(rid, HASHES[:1]) is not None


def test_whatever_fails_in_a_fetch_is_a_miss(fetches, store, monkeypatch, caplog):
    def fail(hashes, take):
        raise ValueError("not one of the store's")

    monkeypatch.setattr(store, "fetch", fail)
    assert fetches.begin("a", HASHES) == 4
    assert fetches.take("a", HASHES) is None
    assert "a fetch failed in us" in caplog.text
    assert fetches.begin("b", HASHES) == 4


def test_nobody_asks_a_store_that_is_not_there():
    with StoreClient("127.0.0.1:1") as client:
        store = open_page_store(client, SETTINGS, pool_of().shape, PLACE)
        fetches = fetches_of(store, 1)
        assert fetches.begin("a", HASHES) == 0
        fetches.close()
