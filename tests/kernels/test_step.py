"""What a step's tokens and sequences are told of their pages, by the kernel and by its reference alike."""

from typing import Any

import pytest
import torch

from tq_kernels import PageLayout, preset, reference_step
from tq_kernels.step import MARK_BYTES, SinkTable, mark_offset, prepare_step

LAYOUT = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
P = LAYOUT.page_tokens
NUM_PAGES = 12


def _int32(numbers: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _seeds(
    table: list[list[int]], lengths: list[int], counts: list[int], device: torch.device, spare: int = 0
) -> list[int]:
    start = [sum(counts[:i]) for i in range(len(counts) + 1)]
    seeds = torch.full((start[-1] + spare,), 77, dtype=torch.int32, device=device)
    prepare_step(
        _int32(table, device), _int32(lengths, device), _int32(start, device), LAYOUT, seed_pages=seeds
    )
    return seeds.tolist()


def test_a_page_opened_after_an_older_one_takes_its_centre(device: torch.device) -> None:
    assert _seeds([[5, 7, -1]], [P + 1], [1], device) == [5]
    assert _seeds([[5, 7, -1]], [P + 2], [1], device) == [-1]
    assert _seeds([[5, 7, 9]], [2 * P + 3], [6], device) == [-1, -1, -1, 7, -1, -1]


def test_a_page_opened_with_the_one_before_it_or_first_of_all_takes_none(device: torch.device) -> None:
    assert set(_seeds([[5, 7, 9]], [2 * P + 3], [2 * P + 3], device)) == {-1}
    whole_second = _seeds([[5, 7, 9]], [3 * P], [2 * P], device)
    assert whole_second == [5, *[-1] * (2 * P - 1)]


def test_sequences_without_tokens_and_tokens_of_nobody_get_nothing(device: torch.device) -> None:
    seeds = _seeds([[5, 7], [0, 0], [3, 4]], [P + 1, 0, P + 1], [1, 0, 1], device, spare=300)
    assert seeds == [5, 3, *[-1] * 300]


def _sinks(device: torch.device, generator: torch.Generator) -> tuple[SinkTable, torch.Tensor]:
    """Rows 0 to 2 of pages 4, 8 and 2; the first two with the marks of their pages."""
    pages = torch.randint(256, (NUM_PAGES, LAYOUT.page_bytes), dtype=torch.uint8, generator=generator)
    offset = mark_offset(LAYOUT)
    marks = torch.zeros(4, MARK_BYTES, dtype=torch.uint8)
    marks[0], marks[1] = pages[4, offset : offset + MARK_BYTES], pages[8, offset : offset + MARK_BYTES]
    row_of_page = torch.full((NUM_PAGES,), -1, dtype=torch.int32)
    row_of_page[[4, 8, 2, 3]] = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    sinks = SinkTable(
        row_of_page=row_of_page.to(device),
        page_of_row=_int32([4, 8, 2, -1], device),
        last_used=_int32([0, 0, 0, 0], device),
        marks=marks.to(device),
    )
    return sinks, pages.to(device)


@pytest.mark.parametrize("opens", [False, True])
def test_a_row_is_believed_while_its_page_is_what_it_was(
    opens: bool, generator: torch.Generator, device: torch.device
) -> None:
    """A page with its mark; a changed one, one of a row given away, one without; beginners; nobody."""
    sinks, pages = _sinks(device, generator)
    table = [[4, 1], [2, 1], [3, 1], [9, 1], [2, 1], [8, 1], [-1, -1], [10**6, 0], [4, 1]]
    lengths = [20, 20, 20, 20, 6, 3, 9, 9, 0]
    counts = [1, 1, 1, 1, 6, 2, 1, 1, 0]
    start = [sum(counts[:i]) for i in range(len(counts) + 1)]
    found = []
    for op in (prepare_step, reference_step.prepare_step):
        seeds = torch.full((start[-1] + 2,), 77, dtype=torch.int32, device=device)
        slots, rows = seeds.clone(), torch.full((len(table),), 77, dtype=torch.int32, device=device)
        last_used = sinks.last_used.clone()
        op(
            _int32(table, device),
            _int32(lengths, device),
            _int32(start, device),
            LAYOUT,
            seed_pages=seeds,
            sinks=SinkTable(
                row_of_page=sinks.row_of_page,
                page_of_row=sinks.page_of_row,
                last_used=last_used,
                marks=sinks.marks,
            ),
            pages=pages,
            sink_slots=slots,
            sink_rows=rows,
            num_sinks=4,
            clock=9,
            opens=opens,
        )
        found.append((seeds.tolist(), slots.tolist(), rows.tolist(), last_used.tolist()))
    assert found[0] == found[1]
    _, slots, rows, last_used = found[0]
    beginner = 2 if opens else -1
    assert rows == [0, -1, -1, -1, beginner, 1, -1, -1, -1]
    assert last_used == [9, 9, 9 if opens else 0, 0]
    own = [8, 9, 10, 11, -1, -1] if opens else [-1] * 6
    # the sixth sequence brings positions 1 and 2
    assert slots == [-1, -1, -1, -1, *own, 5, 6, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"block_table must be \[3, any\]"),
        ({"query_start": torch.zeros(2, dtype=torch.int32)}, r"query_start must be \[3\]"),
        ({"seed_pages": torch.zeros(4)}, "seed_pages must be .* int32"),
        ({"pages": None}, "sinks come with pages"),
        ({"num_sinks": 0}, "sinks come with pages"),
        ({"sink_rows": torch.zeros(3, dtype=torch.int32)}, r"sink_rows must be \[2\]"),
        ({"sink_slots": torch.zeros(3, dtype=torch.int32)}, r"sink_slots must be \[4\]"),
        (
            {"pages": torch.zeros(3, LAYOUT.page_bytes, dtype=torch.uint8)},
            r"row_of_page must be \[3\] int32, not \[12\]",
        ),
        (
            {"pages": torch.zeros(12, LAYOUT.page_bytes, dtype=torch.uint8, device="meta")},
            "the pages are on meta, block_table is on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], message: str, generator: torch.Generator
) -> None:
    sinks, pages = _sinks(torch.device("cpu"), generator)
    arguments = {
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "query_start": torch.zeros(3, dtype=torch.int32),
        "layout": LAYOUT,
        "seed_pages": torch.zeros(4, dtype=torch.int32),
        "sinks": sinks,
        "pages": pages,
        "sink_slots": torch.zeros(4, dtype=torch.int32),
        "sink_rows": torch.zeros(2, dtype=torch.int32),
        "num_sinks": 4,
    }
    with pytest.raises(ValueError, match=message):
        prepare_step(**(arguments | change))


def test_pages_without_a_centre_have_no_mark() -> None:
    fp8 = PageLayout(spec=preset("fp8"), head_dim=64, num_kv_heads=2, page_tokens=16)
    with pytest.raises(ValueError, match="kept for pages that have a centre"):
        mark_offset(fp8)
