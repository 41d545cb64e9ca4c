"""SinkPool: the first tokens of an engine's sequences, raw, in a bounded number of rows on the device.

Attention rests on the first tokens of a sequence, and their keys are unlike all others: read raw, they halve
what compression costs (SmolLM2, tq4: mean logit KL 0.011 with, 0.022 without). A sequence whose row is gone,
or that came from a store, reads what its first page holds of them.
"""

import torch

from tq_kernels.layout import PageLayout
from tq_kernels.step import MARK_BYTES, SinkTable, mark_offset

NUM_SINKS = 4
"""Tokens at the start of a sequence whose keys and values are kept raw."""


def rows_for(max_seqs: int) -> int:
    """Rows for so many sequences at once: half as many more stay for prefixes to be found again."""
    return max_seqs + max_seqs // 2 + 1


class SinkPool:
    """Rows of raw sinks for all layers, and the table that finds them. Nothing here waits for the device.

    A step that begins sequences calls `open_rows`, then `tq_kernels.step.prepare_step(..., opens=True)`,
    writes keys and values of all layers, and calls `mark_rows` once those of the first layer are written.
    Every other step only prepares.

    Args:
        layout: Of the pages.
        num_layers: Layers that have sinks.
        num_rows: Sequences whose sinks are held; see `rows_for`.
        dtype: Of keys and values in the model; float32 ones are held as bfloat16.
        device: Where the pages are.
    """

    def __init__(
        self,
        layout: PageLayout,
        *,
        num_layers: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._mark_offset = mark_offset(layout)
        self._num_rows = num_rows
        held = torch.bfloat16 if dtype == torch.float32 else dtype
        shape = (num_layers, num_rows, NUM_SINKS, layout.num_kv_heads, layout.head_dim)
        self.keys = torch.zeros(shape, dtype=held, device=device)
        self.values = torch.zeros(shape, dtype=held, device=device)
        self.table: SinkTable | None = None
        self._clock = 0

    def bind(self, num_pages: int) -> SinkTable:
        """Make the table for a cache of so many pages; all rows are free."""
        device = self.keys.device
        # one row more takes what is written for sequences that do not count
        rows = self._num_rows + 1
        self.table = SinkTable(
            row_of_page=torch.full((num_pages,), -1, dtype=torch.int32, device=device),
            page_of_row=torch.full((rows,), -1, dtype=torch.int32, device=device),
            last_used=torch.zeros(rows, dtype=torch.int32, device=device),
            marks=torch.zeros(rows, MARK_BYTES, dtype=torch.uint8, device=device),
        )
        return self.table

    def tick(self) -> int:
        """Number of the next step."""
        self._clock += 1
        return self._clock

    def open_rows(self, first_pages: torch.Tensor, begins: torch.Tensor) -> None:
        """Give a row, the longest unused ones first, to the pages of sequences that begin.

        Args:
            first_pages: ``[num_seqs]`` int32 page of each sequence's first tokens.
            begins: ``[num_seqs]`` bool, whether its first token is in this step.
        """
        table = self._bound()
        nowhere = self._num_rows
        longest_unused = table.last_used[:nowhere].argsort()
        place = (begins.cumsum(0) - 1).clamp(0, nowhere - 1)
        rows = torch.where(begins, longest_unused[place], nowhere)
        table.page_of_row[rows] = first_pages
        table.last_used[rows] = self._clock + 1
        pages = torch.where(begins, first_pages, 0).long()
        table.row_of_page[pages] = torch.where(begins, rows.to(torch.int32), table.row_of_page[pages])

    def mark_rows(
        self, pages: torch.Tensor, first_pages: torch.Tensor, begins: torch.Tensor, sink_rows: torch.Tensor
    ) -> None:
        """Remember what the first pages of sequences that begin look like, now that they are written.

        Args:
            pages: ``[num_pages, page_bytes]`` uint8 of the first layer.
            first_pages: As for `open_rows`.
            begins: As for `open_rows`.
            sink_rows: ``[num_seqs]`` int32, as `prepare_step` wrote it.
        """
        table = self._bound()
        rows = torch.where(begins & (sink_rows >= 0), sink_rows, self._num_rows).long()
        held = pages[:, self._mark_offset : self._mark_offset + MARK_BYTES]
        table.marks[rows] = held[torch.where(begins, first_pages, 0).long()]

    def _bound(self) -> SinkTable:
        if self.table is None:
            raise ValueError("bind the pool to a cache first")
        return self.table
