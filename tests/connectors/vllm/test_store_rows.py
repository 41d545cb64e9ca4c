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


@pytest.mark.parametrize("is_near", [False, True])
@pytest.mark.parametrize(("saver", "loader"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_rows_of_other_ranks_are_cut_where_they_lie(tmp_path, is_near, saver, loader):
    """Two heads: each rank has one, all or, of four, a copy of one."""
    saved, loaded = (PageRows(page_layout(2), 2, 2, tp_size) for tp_size in (saver, loader))
    pages = [block_of(saved, key, os.urandom(saved.cell_bytes * saver)) for key in KEYS]
    with (
        running_server(local_socket=tmp_path / "s") as server,
        StoreClient(f"unix:{tmp_path / 's'}" if is_near else server.address) as client,
    ):
        assert StoredRows(client, saved).put([row for _, row in pages]) == [True] * 3
        rows = [Row(key, memory_of(loaded.cell_bytes * loader, 7)) for key in KEYS]
        assert StoredRows(client, loaded, load_threads=2).get(rows) == [True] * 3
        assert [loaded.pack(row.key, row.memory) for row in rows] == [block for block, _ in pages]


def block_of(rows: PageRows, key: BlockKey, memory: bytes) -> tuple[bytes, Row]:
    """A row in which copies of a head are alike, and its block."""
    row = Row(key, memoryview(bytearray(memory)))
    block = rows.pack(key, row.memory)
    rows.unpack(key, block, row.memory)
    return rows.pack(key, row.memory), row


def test_a_store_that_is_not_there_is_a_miss():
    config = ClientConfig(connect_timeout_s=0.2, lookup_timeout_s=0.2, transfer_timeout_s=0.2)
    with StoreClient("127.0.0.1:1", config=config) as client:
        stored = StoredRows(client, ROWS)
        assert stored.contains(KEYS) == [False] * 3
        assert stored.put(filled()) == [False] * 3
        assert stored.get(empty()) == [False] * 3
        assert stored.counters["skipped_calls"]


def test_a_load_that_cannot_be_divided_waits_for_its_parts(server, monkeypatch):
    with StoreClient(server.address) as client:
        stored = StoredRows(client, ROWS, load_threads=3)
        stored.put(filled())
        loaded, submit, runs = empty(), stored._threads.submit, []

        def submit_two(*work):
            if len(runs) == 2:
                raise RuntimeError("can't start new thread")
            runs.append(submit(*work))
            return runs[-1]

        monkeypatch.setattr(stored._threads, "submit", submit_two)
        with pytest.raises(RuntimeError, match="new thread"):
            stored.get(loaded)
        assert all(run.done() for run in runs)
