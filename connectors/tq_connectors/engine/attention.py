"""PagedAttention: one attention layer of an engine whose KV pool holds our pages."""

from dataclasses import dataclass, field

import torch

from tq_connectors.engine.sink_pool import NUM_SINKS
from tq_kernels.decode_attention import DecodeWorkspace, decode_attention
from tq_kernels.dequantize import dequantize_pages
from tq_kernels.extend_attention import ExtendWorkspace, extend_attention
from tq_kernels.layout import PageLayout
from tq_kernels.quantize import quantize_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """What a layer does with the pages of its pool, ``[num_pages, page_bytes]`` uint8.

    Args:
        layout: Of the pages: the KV heads of this process.
        softmax_scale: Factor on the scores.
        sliding_window: Positions that a query sees, or all.
        softcap: Cap of the scores, or none.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys are divided, or None.
        sink_keys: ``[num_rows, NUM_SINKS, num_kv_heads, head_dim]`` of this layer in a `SinkPool`, or None.
        sink_values: The same shape; both or neither.
    """

    layout: PageLayout
    softmax_scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    key_balance: torch.Tensor | None = None
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None
    _sink_slots: tuple[torch.Tensor | None, torch.Tensor | None] = field(
        init=False, repr=False, compare=False
    )
    """Sinks of keys and of values as `quantize_slots` wants them, ``[num_rows * NUM_SINKS, ...]``."""

    def __post_init__(self) -> None:
        slots = [side if side is None else side.flatten(0, 1) for side in (self.sink_keys, self.sink_values)]
        object.__setattr__(self, "_sink_slots", tuple(slots))

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: torch.Tensor,
        *,
        seed_pages: torch.Tensor,
        sink_slots: torch.Tensor | None,
        one_per_page: bool = False,
    ) -> None:
        """Compress tokens into their slots, and keep sinks. May be captured in a graph.

        Args:
            keys: ``[num_tokens, num_kv_heads, head_dim]``.
            values: The same shape.
            slot_mapping: ``[num_tokens]`` page * page_tokens + offset, -1 to skip.
            pages: The layer's pool.
            seed_pages: ``[num_tokens]`` int32 of `prepare_step`.
            sink_slots: Likewise; only of layers with sinks.
            one_per_page: Whether no two tokens have the same page, as in a decode step of one token each.
        """
        kept = self.sink_keys is not None and sink_slots is not None
        sink_keys, sink_values = self._sink_slots if kept else (None, None)
        quantize_slots(
            keys,
            values,
            slot_mapping,
            pages,
            self.layout,
            one_per_page=one_per_page,
            seed_pages=seed_pages,
            key_balance=self.key_balance,
            sink_slots=sink_slots if kept else None,
            sink_keys=sink_keys,
            sink_values=sink_values,
        )

    def decode(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        sink_rows: torch.Tensor | None,
        workspace: DecodeWorkspace,
        out: torch.Tensor,
    ) -> None:
        """Attend with the newest token of every sequence, or the newest few. May be captured in a graph.

        Args:
            query: ``[num_seqs, num_query_heads, head_dim]`` or ``[num_seqs, rows, ...]``.
            pages: The layer's pool, the new tokens written.
            block_table: ``[num_seqs, max_pages]`` int32.
            lengths: ``[num_seqs]`` int32 tokens, new ones included.
            sink_rows: ``[num_seqs]`` int32 of `prepare_step`; only of layers with sinks.
            workspace: From `DecodeWorkspaces`.
            out: Written: the query's shape.
        """
        has_sinks = self.sink_keys is not None and sink_rows is not None
        decode_attention(
            query,
            pages,
            block_table,
            lengths,
            self.layout,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            num_sinks=NUM_SINKS if has_sinks else 0,
            sink_keys=self.sink_keys if has_sinks else None,
            sink_values=self.sink_values if has_sinks else None,
            sink_rows=sink_rows if has_sinks else None,
            key_balance=self.key_balance,
            out=out,
            workspace=workspace,
        )

    def extend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        prefix_len: int,
        *,
        sink_row: torch.Tensor | None,
        workspace: ExtendWorkspace | None,
        out: torch.Tensor,
    ) -> None:
        """Attend with a chunk of one sequence over its compressed prefix and, raw, over itself.

        Args:
            query: ``[num_new, num_query_heads, head_dim]``.
            keys: ``[num_new, num_kv_heads, head_dim]`` of the chunk.
            values: The same shape.
            pages: The layer's pool.
            block_table: ``[max_pages]`` int32 of this sequence.
            prefix_len: Tokens before the chunk, on the host; 0 for none.
            sink_row: ``[1]`` int32 of `prepare_step`; only of layers with sinks.
            workspace: Room for a run of the prefix, or None to make it.
            out: Written: the query's shape.
        """
        num_sinks = 0
        if self.sink_keys is not None and sink_row is not None and prefix_len:
            num_sinks = min(NUM_SINKS, prefix_len)
            sinks = self._sinks(pages, block_table, sink_row, keys.dtype)
            keys = torch.cat((sinks[0][:num_sinks], keys))
            values = torch.cat((sinks[1][:num_sinks], values))
        extend_attention(
            query,
            keys,
            values,
            pages,
            block_table,
            prefix_len,
            self.layout,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            num_sinks=num_sinks,
            key_balance=self.key_balance,
            out=out,
            workspace=workspace,
        )

    def _sinks(
        self, pages: torch.Tensor, block_table: torch.Tensor, sink_row: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sinks of a sequence: those of its row, or, without one, what its first page holds of them."""
        assert self.sink_keys is not None and self.sink_values is not None  # noqa: PT018  # the caller's check
        shape = (1, *self.sink_keys.shape[1:])
        held_keys = torch.empty(shape, dtype=dtype, device=pages.device)
        held_values = torch.empty_like(held_keys)
        token = torch.arange(self.layout.page_tokens, device=pages.device)
        dequantize_pages(
            pages,
            block_table[:1],
            held_keys,
            held_values,
            torch.where(token < NUM_SINKS, token, -1),
            self.layout,
            key_balance=self.key_balance,
        )
        row, has_row = sink_row.clamp(min=0).long(), (sink_row >= 0)[:, None, None, None]
        keys, values = (
            torch.where(has_row, side[row].to(dtype), of_page)[0]
            for side, of_page in (
                (self.sink_keys, held_keys),
                (self.sink_values, held_values),
            )
        )
        return keys, values
