"""Steps: what attention must know of a batch, from SGLang's tables, made on the device without waiting."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from tq_connectors.engine.short_chunks import Chunk, ShortChunks, short_chunks
from tq_connectors.engine.sink_pool import NUM_SINKS, SinkPool
from tq_connectors.sglang.segments import Segment, cut_into_segments
from tq_kernels.layout import PageLayout
from tq_kernels.step import prepare_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass, for all layers.

    Args:
        block_table: ``[num_seqs, max_pages]`` int32 pages of every sequence.
        lengths: ``[num_seqs]`` int32 tokens of every sequence, new ones included.
        query_start: ``[num_seqs + 1]`` int32 first new token of each, then their end.
        slots: ``[num_tokens]`` int64 where new tokens are written, or -1 for padding.
        seed_pages: ``[num_tokens]`` int32, as `PagedAttention.write` takes them.
        sink_slots: ``[num_tokens]`` int32, likewise.
        sink_rows: ``[num_seqs]`` int32, as `PagedAttention.decode` takes them.
        begins: ``[num_seqs]`` bool, of sequences whose first token is in this pass; None if there are none.
        segments: How prefill is cut; none in decode.
        short: Its short segments, all together.
    """

    block_table: torch.Tensor
    lengths: torch.Tensor
    query_start: torch.Tensor
    slots: torch.Tensor
    seed_pages: torch.Tensor
    sink_slots: torch.Tensor
    sink_rows: torch.Tensor
    begins: torch.Tensor | None = None
    segments: tuple[Segment, ...] = ()
    short: ShortChunks | None = None

    @property
    def first_pages(self) -> torch.Tensor:
        """``[num_seqs]`` int32 page of each sequence's first tokens."""
        return self.block_table[:, 0]

    def of_decode(self, num_seqs: int) -> "Batch":
        """The memory of this batch, for decodes of so many sequences."""
        return Batch(
            block_table=self.block_table[:num_seqs],
            lengths=self.lengths[:num_seqs],
            query_start=self.query_start[: num_seqs + 1],
            slots=self.slots[:num_seqs],
            seed_pages=self.seed_pages[:num_seqs],
            sink_slots=self.sink_slots[:num_seqs],
            sink_rows=self.sink_rows[:num_seqs],
        )


class Steps:
    """Makes batches.

    Args:
        layout: Of the pages.
        req_to_token: ``[num_requests, context]`` int32 slots of SGLang's requests, a page's slots together.
        first_layer: Gives the pages of the first layer, ``[num_pages, page_bytes]`` uint8, as
            `TQTokenToKVPool.pages` does: sinks are believed only while a page is what it was, so what is
            being loaded into it must have come.
        sinks: Raw sinks, bound to so many pages; None without.
        num_query_heads: Query heads of this rank.
    """

    def __init__(
        self,
        layout: PageLayout,
        *,
        req_to_token: torch.Tensor,
        first_layer: Callable[[], torch.Tensor],
        sinks: SinkPool | None,
        num_query_heads: int,
    ) -> None:
        self._layout = layout
        self._first_slots = req_to_token[:, :: layout.page_tokens]
        self._first_layer = first_layer
        self._sinks = sinks
        self._num_query_heads = num_query_heads

    def empty(self, num_seqs: int, num_tokens: int, max_tokens: int) -> Batch:
        """Memory for a batch whose longest sequence has max_tokens; its queries start one after the other."""
        device = self._first_slots.device
        max_pages = min(-(-max_tokens // self._layout.page_tokens), self._first_slots.shape[1])

        def int32(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return Batch(
            block_table=int32(num_seqs, max_pages),
            lengths=int32(num_seqs),
            query_start=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            slots=torch.empty(num_tokens, dtype=torch.int64, device=device),
            seed_pages=int32(num_tokens),
            sink_slots=int32(num_tokens),
            sink_rows=int32(num_seqs),
        )

    def fill_decode(
        self, batch: Batch, rows: torch.Tensor, lengths: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> None:
        """One new token of every sequence, into memory that graphs know.

        Args:
            batch: Written.
            rows: ``[num_seqs]`` integers, requests of the batch.
            lengths: ``[num_seqs]`` integers, tokens of each, the new one included.
            out_cache_loc: ``[num_seqs or fewer]`` int64 slots of the new tokens; those of sequences that fill
                up a graph may be left out.
        """
        self._fill(batch, rows, lengths, out_cache_loc)
        self._prepare(batch)

    def extend(
        self,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        new_lens: torch.Tensor,
        out_cache_loc: torch.Tensor,
        *,
        prefix_lens_host: list[int],
        new_lens_host: list[int],
    ) -> Batch:
        """New tokens of every sequence.

        Args:
            rows: ``[num_seqs]`` integers, requests of the batch.
            lengths: ``[num_seqs]`` integers, tokens of each, new ones included.
            new_lens: ``[num_seqs]`` integers, new tokens of each.
            out_cache_loc: ``[num_tokens]`` int64 slots of the new tokens.
            prefix_lens_host: Tokens of each that are in pages.
            new_lens_host: `new_lens`.
        """
        longest = max(map(sum, zip(prefix_lens_host, new_lens_host, strict=True)))
        memory = self.empty(len(rows), len(out_cache_loc), longest)
        batch = Batch(
            block_table=memory.block_table,
            lengths=memory.lengths,
            query_start=memory.query_start,
            slots=memory.slots,
            seed_pages=memory.seed_pages,
            sink_slots=memory.sink_slots,
            sink_rows=memory.sink_rows,
            # fewer tokens than a row has would mark it with what others may begin with as well
            begins=(lengths == new_lens) & (new_lens >= NUM_SINKS) if 0 in prefix_lens_host else None,
            segments=cut_into_segments(prefix_lens_host, new_lens_host),
        )
        torch.cumsum(new_lens, 0, out=batch.query_start[1:])
        self._fill(batch, rows, lengths, out_cache_loc)
        self._prepare(batch)
        chunks = [
            Chunk(seq=seq, first_token=first, num_new=new, prefix_len=prefix)
            for seq, (first, new, prefix) in enumerate(
                zip(accumulate(new_lens_host, initial=0), new_lens_host, prefix_lens_host, strict=False)
            )
        ]
        short = short_chunks(
            chunks,
            batch.block_table,
            batch.sink_rows,
            self._layout,
            num_query_heads=self._num_query_heads,
        )
        return replace(batch, short=short)

    def _fill(
        self, batch: Batch, rows: torch.Tensor, lengths: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> None:
        table, page_tokens = batch.block_table, self._layout.page_tokens
        torch.index_select(self._first_slots[:, : table.shape[1]], 0, rows, out=table)
        table.floor_divide_(page_tokens)
        batch.lengths.copy_(lengths)
        # page 0 is where SGLang sends padding, which all tokens of it share
        written = batch.slots[: len(out_cache_loc)]
        written.copy_(out_cache_loc).masked_fill_(out_cache_loc < page_tokens, -1)
        batch.slots[len(out_cache_loc) :].fill_(-1)

    def _prepare(self, batch: Batch) -> None:
        if self._sinks is None:
            prepare_step(
                batch.block_table,
                batch.lengths,
                batch.query_start,
                self._layout,
                seed_pages=batch.seed_pages,
            )
            batch.sink_rows.fill_(-1)
            return
        if batch.begins is not None:
            self._sinks.open_rows(batch.first_pages, batch.begins)
        prepare_step(
            batch.block_table,
            batch.lengths,
            batch.query_start,
            self._layout,
            seed_pages=batch.seed_pages,
            sinks=self._sinks.table,
            pages=self._first_layer(),
            sink_slots=batch.sink_slots,
            sink_rows=batch.sink_rows,
            num_sinks=NUM_SINKS,
            clock=self._sinks.tick(),
            opens=batch.begins is not None,
        )

    def first_layer_written(self, batch: Batch) -> None:
        """Remember the pages of sequences that begin, once the first layer has written them."""
        if self._sinks is not None and batch.begins is not None:
            self._sinks.mark_rows(self._first_layer(), batch.first_pages, batch.begins, batch.sink_rows)
