"""Before a step of an engine: which pages seed centres, and where raw sinks of sequences lie.

Raw sinks are the first tokens of a sequence, kept besides its pages in a bounded number of rows. A row is
found by the sequence's first page, and believed only while the page holds what it held when the row was
written: engines reuse pages, and fill them from elsewhere, without telling.
"""

from dataclasses import dataclass

import torch

from tq_kernels import reference_step
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import check_pages, check_tensor
from tq_kernels.compiled import launch
from tq_kernels.layout import PageLayout

MARK_BYTES = 64
"""Of the first page's first centre: what tells that a page still is the one that it was."""
_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkTable:
    """Which row holds the sinks of which first page. All are changed in place.

    Args:
        row_of_page: ``[num_pages]`` int32, -1 or the row that was last given to a page.
        page_of_row: ``[num_rows]`` int32, -1 or the page that a row was last given to: what both say holds.
        last_used: ``[num_rows]`` int32, the clock of the last step that used a row.
        marks: ``[num_rows, MARK_BYTES]`` uint8, of the page when its sinks were written.
    """

    row_of_page: torch.Tensor
    page_of_row: torch.Tensor
    last_used: torch.Tensor
    marks: torch.Tensor


def mark_offset(layout: PageLayout) -> int:
    """First byte, in a page, of what marks it.

    Raises:
        ValueError: Pages without a centre, or with one too small, have no mark.
    """
    center = layout.plane("key_center")
    if center is None or center.num_bytes < MARK_BYTES:
        raise ValueError("raw sinks are kept for pages that have a centre of 32 channels or more")
    return center.offset


def prepare_step(
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    query_start: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor,
    sinks: SinkTable | None = None,
    pages: torch.Tensor | None = None,
    sink_slots: torch.Tensor | None = None,
    sink_rows: torch.Tensor | None = None,
    num_sinks: int = 0,
    clock: int = 0,
    opens: bool = False,
) -> None:
    """Fill in what `quantize_slots` and `decode_attention` take as `seed_pages`, `sink_slots`, `sink_rows`.

    One launch, without an allocation or a wait; all results are written in place.

    Args:
        block_table: ``[num_seqs, max_pages]`` int32.
        lengths: ``[num_seqs]`` int32 tokens of each sequence, those of this step included.
        query_start: ``[num_seqs + 1]`` int32 first token of each sequence in this step, then their end.
        layout: Page geometry and codec.
        seed_pages: Written: ``[num_tokens]`` int32. A page that this step opens takes the centre of the page
            before it, unless the step opens that one too; -1 elsewhere, and for tokens of nobody at the end.
        sinks: The rows there are; the following come with it.
        pages: ``[num_pages, page_bytes]`` uint8 of the model's first layer.
        sink_slots: Written: ``[num_tokens]`` int32 row * num_sinks + position, or -1.
        sink_rows: Written: ``[num_seqs]`` int32 row, or -1 for a sequence that has no raw sinks.
        num_sinks: Tokens in a row.
        clock: Number of the step, for `SinkTable.last_used`.
        opens: Whether sequences that begin in this step have been given rows for it.

    Raises:
        ValueError: An argument of another shape, dtype or device.
    """
    num_seqs, device = len(lengths), block_table.device
    int32 = (torch.int32,)
    check_tensor("block_table", block_table, (num_seqs, None), int32, device)
    check_tensor("lengths", lengths, (num_seqs,), int32, device)
    check_tensor("query_start", query_start, (num_seqs + 1,), int32, device)
    check_tensor("seed_pages", seed_pages, (None,), int32, device)
    offset = 0
    if sinks is not None:
        if pages is None or sink_slots is None or sink_rows is None or num_sinks < 1:
            raise ValueError("sinks come with pages, sink_slots, sink_rows and num_sinks")
        offset = mark_offset(layout)
        check_pages(pages, layout)
        if pages.device != device:
            raise ValueError(f"the pages are on {pages.device}, block_table is on {device}")
        check_tensor("sink_slots", sink_slots, (len(seed_pages),), int32, device)
        check_tensor("sink_rows", sink_rows, (num_seqs,), int32, device)
        check_tensor("row_of_page", sinks.row_of_page, (len(pages),), int32, device)
        rows = len(sinks.page_of_row)
        check_tensor("page_of_row", sinks.page_of_row, (rows,), int32, device)
        check_tensor("last_used", sinks.last_used, (rows,), int32, device)
        check_tensor("marks", sinks.marks, (rows, MARK_BYTES), (torch.uint8,), device, contiguous_dims=2)
    if not takes_kernel(device):
        reference_step.prepare_step(
            block_table,
            lengths,
            query_start,
            layout,
            seed_pages=seed_pages,
            sinks=sinks,
            pages=pages,
            sink_slots=sink_slots,
            sink_rows=sink_rows,
            num_sinks=num_sinks,
            clock=clock,
            opens=opens,
        )
        return
    from tq_kernels.device.step import prepare  # Triton is there on some platforms only

    launch(
        prepare,
        (num_seqs + 1,),
        p_table=block_table,
        p_lengths=lengths,
        p_query_start=query_start,
        p_seeds=seed_pages,
        p_sink_slots=sink_slots,
        p_sink_rows=sink_rows if sinks is not None else None,
        p_row_of_page=sinks.row_of_page if sinks is not None else None,
        p_page_of_row=sinks.page_of_row if sinks is not None else None,
        p_last_used=sinks.last_used if sinks is not None else None,
        p_marks=sinks.marks if sinks is not None else None,
        p_pages=pages if sinks is not None else None,
        table_stride=block_table.stride(0),
        page_stride=pages.stride(0) if pages is not None else 0,
        num_seqs=num_seqs,
        num_tokens=len(seed_pages),
        num_pages=len(pages) if pages is not None else 0,
        clock=clock,
        mark_offset=offset,
        OPENS=opens,
        SINKS=num_sinks,
        MARK=MARK_BYTES,
        P=layout.page_tokens,
        TILE=_TILE,
        num_warps=1,
    )
