"""Rows of vLLM's host memory: blocks that every division of the heads reads, and nothing else."""

import os

import pytest
from connectors.vllm.rows_of import memory_of, page_layout

from tq_connectors.codec import unpack_pages
from tq_connectors.vllm.rows import PageRows, RawRows
from tq_store.block import payload_of
from tq_store.errors import BlockFormatError, ConfigError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey

KEY, OTHER = BlockKey(bytes(BLOCK_KEY_BYTES)), BlockKey(bytes([1]) * BLOCK_KEY_BYTES)


def page_rows(tp_size: int = 1, heads: int = 4, pages: int = 2) -> PageRows:
    return PageRows(page_layout(heads), 3, pages, tp_size)


def filled(rows: PageRows, padding: int = 100) -> memoryview:
    return memoryview(bytearray(os.urandom(rows.cell_bytes * rows.tp_size + padding)))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_row_comes_back_and_its_padding_is_left_alone(tp_size):
    rows = page_rows(tp_size)
    row = filled(rows)
    loaded = memory_of(len(row), 7)
    rows.unpack(KEY, rows.pack(KEY, row), loaded)
    assert loaded[:-100] == row[:-100]
    assert set(loaded[-100:]) == {7}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_row_is_filled_where_it_lies(tp_size):
    rows = page_rows(tp_size)
    row = filled(rows)
    loaded = memory_of(len(row), 7)
    placed = rows.placed(KEY, loaded)
    placed.fill(payload_of(rows.pack(KEY, row)))
    assert loaded[:-100] == row[:-100]
    assert set(loaded[-100:]) == {7}
    assert (placed.copy is None) == (tp_size > 1)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 4), (4, 1), (2, 8)])
def test_what_some_ranks_saved_other_numbers_of_ranks_load(saved, loaded):
    writer, reader = page_rows(saved), page_rows(loaded)
    row = filled(writer, 0)
    block = writer.pack(KEY, row)
    other = memory_of(reader.cell_bytes * loaded)
    reader.unpack(KEY, block, other)
    assert reader.pack(KEY, other) == block


def test_ranks_that_share_a_head_hold_the_same():
    writer, reader = page_rows(1), page_rows(8)
    row = memory_of(reader.cell_bytes * 8)
    reader.unpack(KEY, writer.pack(KEY, filled(writer)), row)
    cells = [bytes(row[rank * reader.cell_bytes : (rank + 1) * reader.cell_bytes]) for rank in range(8)]
    assert cells[::2] == cells[1::2]
    assert len(set(cells)) == 4


def test_a_chunk_of_one_page_is_the_block_of_every_connector():
    rows = page_rows(tp_size=2, pages=1)
    row = filled(rows, 0)
    pages = unpack_pages(rows.layout, 3, KEY, rows.pack(KEY, row))
    section = rows.layout.section_bytes
    assert pages[: 2 * section] == row[: 2 * section]
    assert pages[2 * section : 4 * section] == row[rows.cell_bytes : rows.cell_bytes + 2 * section]


def test_heads_and_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="4 KV heads cannot be spread evenly over 3 ranks"):
        page_rows(3)


@pytest.mark.parametrize("other", [page_rows(pages=1), page_rows(heads=2), PageRows(page_layout(4), 2, 2)])
def test_a_block_of_another_shape_leaves_the_row_as_it_was(other):
    rows = page_rows()
    row = memory_of(rows.cell_bytes, 7)
    with pytest.raises(BlockFormatError):
        rows.unpack(KEY, other.pack(KEY, filled(other)), row)
    assert set(row) == {7}


def test_a_block_of_another_key_leaves_the_row_as_it_was():
    rows = page_rows()
    with pytest.raises(BlockFormatError):
        rows.unpack(KEY, rows.pack(OTHER, filled(rows)), memory_of(rows.cell_bytes))


def test_raw_rows_come_back_to_the_same_division_only():
    rows = RawRows(1000, 2, "tp 2")
    row = memoryview(bytearray(os.urandom(2048)))
    block = rows.pack(KEY, row)
    loaded = memory_of(2048)
    rows.unpack(KEY, block, loaded)
    assert loaded[:2000] == row[:2000]
    for other in (RawRows(500, 4, "tp 2"), RawRows(1000, 2, "tp 1")):
        with pytest.raises(BlockFormatError, match="the block holds 2000 bytes of vllm 2 x 1000 bytes, tp 2"):
            other.unpack(KEY, block, memory_of(2048))
