"""Rows on a real server: found, filled, and every failure a miss."""

import os

import pytest
from connectors.vllm.rows_of import memory_of, page_layout
from store.running_server import running_server

from tq_connectors.vllm.rows import PageRows
from tq_connectors.vllm.store_rows import Row, StoredRows
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.keys import BlockKey

ROWS = PageRows(page_layout(2), 2, 1)
KEYS = [BlockKey(bytes([number]) * 64) for number in range(3)]


def filled() -> list[Row]:
    return [Row(key, memoryview(bytearray(os.urandom(ROWS.cell_bytes)))) for key in KEYS]


def empty() -> list[Row]:
    return [Row(key, memory_of(ROWS.cell_bytes, 7)) for key in KEYS]


@pytest.fixture
def server():
    with running_server() as running:
        yield running


def test_rows_are_put_once_and_come_back(server):
    rows = filled()
    with StoreClient(server.address) as client:
        stored = StoredRows(client, ROWS)
        assert stored.contains(KEYS) == [False] * 3
        assert stored.put(rows[1:]) == [True, True]
        assert stored.contains(KEYS) == [False, True, True]
        assert stored.put(rows) == [True] * 3
        loaded = empty()
        assert stored.get(loaded) == [True] * 3
        assert [bytes(row.memory) for row in loaded] == [bytes(row.memory) for row in rows]
        assert not stored.counters["rejected_rows"]


def test_a_block_of_another_shape_is_a_miss_that_is_counted(server, caplog):
    other = PageRows(page_layout(2), 1, 1)
    with StoreClient(server.address) as client:
        StoredRows(client, other).put([Row(KEYS[1], memory_of(other.cell_bytes))])
        stored = StoredRows(client, ROWS)
        stored.put(filled()[:1])
        loaded = empty()
        assert stored.get(loaded) == [True, False, False]
        assert set(loaded[1].memory) == {7}
        assert stored.counters["rejected_rows"] == 1
        assert "another codec" in caplog.text


def test_a_store_that_is_not_there_is_a_miss():
    config = ClientConfig(connect_timeout_s=0.2, lookup_timeout_s=0.2, transfer_timeout_s=0.2)
    with StoreClient("127.0.0.1:1", config=config) as client:
        stored = StoredRows(client, ROWS)
        assert stored.contains(KEYS) == [False] * 3
        assert stored.put(filled()) == [False] * 3
        assert stored.get(empty()) == [False] * 3
        assert stored.counters["skipped_calls"]
