"""Objects through a real server: whole, or a miss that is counted."""

import logging

import pytest
from store.running_server import running_server
from store.sample_blocks import sample_block, sample_key

from tq_connectors.envelope import MAX_LAYOUT_BYTES
from tq_connectors.lmcache import object_store
from tq_connectors.lmcache.object_store import NewObject, ObjectStore
from tq_store.client import StoreClient

NEW = [NewObject(sample_key(number), f"uint8[{number}]", bytes([number]) * number) for number in range(1, 6)]
KEYS = [new.key for new in NEW]


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture
def client(server):
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection


def found_by(store: ObjectStore, keys) -> dict[int, tuple[str, bytes]]:
    return {position: (found.layout, bytes(found.data)) for position, found in store.get(keys)}


def test_objects_come_back_by_position(client):
    store = ObjectStore(client)
    assert store.put(NEW) == [True] * 5
    assert store.put(NEW[:2]) == [True, True]  # there already
    asked = [sample_key(99), *KEYS]
    assert store.contains(asked) == [False] + [True] * 5
    assert found_by(store, asked) == {
        position: (new.layout, new.data) for position, new in enumerate(NEW, start=1)
    }
    assert store.delete(asked[:2]) == [False, True]
    assert store.contains(KEYS[:1]) == [False]
    assert store.ping()
    assert store.is_reachable


def test_many_bytes_go_in_several_calls(client, monkeypatch):
    monkeypatch.setattr(object_store, "_BATCH_BYTES", 600)
    store = ObjectStore(client)
    assert store.put(NEW) == [True] * 5
    assert store.contains(KEYS) == [True] * 5


def test_nothing_to_store_is_stored(client):
    assert ObjectStore(client).put([]) == []


def test_an_object_that_makes_no_block_is_refused_and_the_others_are_stored(client, caplog):
    store = ObjectStore(client)
    strange = NewObject(sample_key(7), "x" * (MAX_LAYOUT_BYTES + 1), b"")
    assert store.put([NEW[0], strange, NEW[1]]) == [True, False, True]
    assert store.counters["refused_objects"] == 1
    assert "not stored" in caplog.text


def test_a_block_of_another_kind_is_a_miss(client, caplog):
    store = ObjectStore(client)
    client.put([sample_block(1)])
    store.put(NEW[1:2])
    assert list(found_by(store, KEYS[:2])) == [1]
    assert store.counters["rejected_objects"] == 1
    assert "does not hold an object" in caplog.text


def test_without_a_server_everything_is_a_miss_and_said_once(caplog):
    with running_server() as server:
        address = server.address
    with StoreClient(address) as client, caplog.at_level(logging.WARNING):
        store = ObjectStore(client)
        assert store.contains(KEYS) is None
        assert store.put(NEW) == [False] * 5
        assert found_by(store, KEYS) == {}
        assert store.delete(KEYS) == [False] * 5
        assert not store.ping()
        assert not store.is_reachable
        assert store.counters["failed_calls"] >= 5
    assert caplog.text.count("everything is a miss") == 1
