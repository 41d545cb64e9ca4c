"""Plain Python for `step.prepare_step`, one sequence and one token at a time: the truth for its kernel."""

from typing import TYPE_CHECKING

import torch

from tq_kernels.layout import PageLayout

if TYPE_CHECKING:
    from tq_kernels.step import SinkTable


def prepare_step(
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    query_start: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor,
    sinks: "SinkTable | None",
    pages: torch.Tensor | None,
    sink_slots: torch.Tensor | None,
    sink_rows: torch.Tensor | None,
    num_sinks: int,
    clock: int,
    opens: bool,
) -> None:
    """See `step.prepare_step`."""
    seeds = [-1] * len(seed_pages)
    slots = [-1] * len(seed_pages)
    starts = query_start.tolist()
    for seq, length in enumerate(lengths.tolist()):
        start, count = starts[seq], starts[seq + 1] - starts[seq]
        context = length - count
        row = -1
        if sinks is not None and pages is not None and sink_rows is not None:
            if count > 0:
                row = _row(sinks, pages, int(block_table[seq, 0]), layout, context, opens)
            sink_rows[seq] = row
            if row >= 0:
                sinks.last_used[row] = clock
        for token in range(count):
            position = context + token
            before = position - layout.page_tokens
            if position % layout.page_tokens == 0 and 0 <= before < context:
                seeds[start + token] = int(block_table[seq, position // layout.page_tokens - 1])
            if row >= 0 and position < num_sinks:
                slots[start + token] = row * num_sinks + position
    seed_pages.copy_(torch.tensor(seeds, dtype=torch.int32))
    if sink_slots is not None and sinks is not None:
        sink_slots.copy_(torch.tensor(slots, dtype=torch.int32))


def _row(
    sinks: "SinkTable", pages: torch.Tensor, page: int, layout: PageLayout, context: int, opens: bool
) -> int:
    """The row of a sequence's first page, or -1."""
    if not 0 <= page < len(pages):
        return -1
    row = int(sinks.row_of_page[page])
    if row < 0 or int(sinks.page_of_row[row]) != page:
        return -1
    if context == 0:
        return row if opens else -1
    center = layout.plane("key_center")
    assert center is not None  # `step.mark_offset` has made sure
    mark = sinks.marks[row]
    return row if torch.equal(mark, pages[page, center.offset : center.offset + len(mark)]) else -1
