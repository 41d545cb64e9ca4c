"""Rows of raw sinks: given to sequences that begin, kept while they are used, and taken from the idle."""

import pytest
import torch

from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.sink_pool import NUM_SINKS, SinkPool, rows_for
from tq_kernels.step import mark_offset, prepare_step

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=2)
NUM_PAGES = 9


class Engine:
    """Steps of an engine that writes nothing but what marks a page."""

    def __init__(self, num_rows: int) -> None:
        self.pool = SinkPool(
            LAYOUT, num_layers=2, num_rows=num_rows, dtype=torch.float32, device=torch.device("cpu")
        )
        self.table = self.pool.bind(NUM_PAGES)
        self.pages = torch.zeros(NUM_PAGES, LAYOUT.page_bytes, dtype=torch.uint8)
        self._next = 1

    def step(self, first_pages: list[int], lengths: list[int], counts: list[int]) -> list[int]:
        """Rows of the sequences after a step."""
        table = torch.tensor(first_pages, dtype=torch.int32)[:, None]
        begins = torch.tensor([length == count > 0 for length, count in zip(lengths, counts, strict=True)])
        if begins.any():
            self.pool.open_rows(table[:, 0], begins)
        rows = torch.full((len(lengths),), 99, dtype=torch.int32)
        tokens = torch.zeros(sum(counts), dtype=torch.int32)
        prepare_step(
            table,
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            LAYOUT,
            seed_pages=tokens,
            sinks=self.table,
            pages=self.pages,
            sink_slots=tokens.clone(),
            sink_rows=rows,
            num_sinks=NUM_SINKS,
            clock=self.pool.tick(),
            opens=bool(begins.any()),
        )
        for page, begin in zip(first_pages, begins.tolist(), strict=True):
            if begin:
                self.change(page)
        self.pool.mark_rows(self.pages, table[:, 0], begins, rows)
        return rows.tolist()

    def change(self, page: int) -> None:
        """Write the page anew."""
        self._next += 1
        self.pages[page, mark_offset(LAYOUT) :] = self._next


def test_a_sequence_keeps_its_row_and_others_get_others() -> None:
    engine = Engine(4)
    (first,) = engine.step([5], [10], [10])
    rows = engine.step([5, 7, 2], [11, 3, 6], [1, 3, 6])
    assert rows[0] == first
    assert len(set(rows)) == 3
    assert engine.step([2, 5, 7], [7, 12, 4], [1, 1, 1]) == [rows[2], rows[0], rows[1]]


def test_a_prefix_that_is_found_again_finds_its_row_until_the_page_is_another() -> None:
    engine = Engine(4)
    rows = engine.step([5], [100], [100])
    assert engine.step([5], [90], [26]) == rows
    engine.change(5)
    assert engine.step([5], [90], [26]) == [-1]


def test_the_longest_unused_row_is_taken_and_its_sequence_has_none_from_then_on() -> None:
    engine = Engine(3)
    rows = [engine.step([page], [10], [10])[0] for page in (1, 2, 3)]
    assert sorted(rows) == [0, 1, 2]
    engine.step([1], [11], [1])
    assert engine.step([4], [10], [10]) == [rows[1]]
    assert engine.step([1, 2, 3], [12, 11, 11], [1, 1, 1]) == [rows[0], -1, rows[2]]


def test_a_page_that_begins_anew_has_its_new_row_only() -> None:
    engine = Engine(3)
    engine.step([1], [10], [10])
    (row,) = engine.step([1], [8], [8])
    assert engine.step([1], [9], [1]) == [row]


def test_more_sequences_than_rows_leave_the_others_without_harm() -> None:
    engine = Engine(2)
    rows = engine.step([1, 2, 3], [10, 10, 10], [10, 10, 10])
    later = engine.step([1, 2, 3], [11, 11, 11], [1, 1, 1])
    held = [row for row in later if row >= 0]
    assert len(held) == len(set(held)) == 2
    assert all(row in (-1, was) for row, was in zip(later, rows, strict=True))


def test_a_pool_wants_a_cache_and_counts_its_rows() -> None:
    pool = SinkPool(LAYOUT, num_layers=2, num_rows=5, dtype=torch.float16, device=torch.device("cpu"))
    assert pool.keys.shape == pool.values.shape == (2, 5, NUM_SINKS, 2, 64)
    assert pool.keys.dtype == torch.float16
    with pytest.raises(ValueError, match="bind the pool"):
        pool.open_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.bool))
    assert rows_for(256) == 385
