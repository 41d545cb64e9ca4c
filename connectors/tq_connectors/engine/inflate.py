"""Inflater: long chunks over a compressed prefix by an engine's own attention, on a prefix made dense again.

A chunk of thousands of tokens reads its prefix once for all of them, so that tensor cores, not memory, are
the limit: there a library's dense attention wins, and bringing back a prefix costs a few percent of it.
"""

from typing import Protocol

import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.sink_pool import NUM_SINKS
from tq_kernels.dequantize import dequantize_pages
from tq_kernels.layout import PageLayout

SMALLEST_CHUNK = 256
"""New tokens from which this is faster than kernels that read pages as they are."""
INFLATED_TOKENS = 32768
"""Tokens that are dense at once, prefix and chunk: 128 MiB at 8 KV heads of 128 channels."""


class DenseAttention(Protocol):
    """Attention of one sequence over dense keys and values, with the layer's scale, window and cap."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, and the natural log-sum-exp of the scores.

        Args:
            query: ``[num_new, num_query_heads, head_dim]``.
            keys: ``[num_tokens, num_kv_heads, head_dim]``.
            values: The same shape.
            causal: Whether the queries are the last num_new of the tokens; else they see all of them.

        Returns:
            The query's shape, and ``[num_query_heads, num_new]`` float32.
        """


class Inflater:
    """Room for a dense prefix and chunk; it may serve all layers in turn.

    Args:
        layout: Of the pages.
        dtype: Of keys and values in the model, bf16 or fp16.
        device: Where the pages are.
        max_tokens: Tokens of the longest sequence; no more room is taken than that wants.
    """

    def __init__(
        self, layout: PageLayout, *, dtype: torch.dtype, device: torch.device, max_tokens: int
    ) -> None:
        self._layout = layout
        tokens = -(-min(max_tokens, INFLATED_TOKENS) // layout.page_tokens) * layout.page_tokens
        shape = (1, tokens, layout.num_kv_heads, layout.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._slots = torch.arange(tokens, device=device)

    def serves(self, attention: PagedAttention, num_new: int, prefix_len: int) -> bool:
        """Whether such a chunk is faster here, and fits."""
        room = len(self._slots)
        if num_new < SMALLEST_CHUNK or not prefix_len:
            return False
        fits_at_once = prefix_len + num_new <= room
        return fits_at_once or (
            attention.sliding_window is None and num_new + self._layout.page_tokens <= room
        )

    def attend(
        self,
        attention: PagedAttention,
        dense: DenseAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        prefix_len: int,
        *,
        sink_row: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """What `PagedAttention.extend` does, of the same arguments, for what `serves`."""
        page_tokens, room, num_new = self._layout.page_tokens, len(self._slots), len(query)
        beside_chunk = (room - num_new) // page_tokens * page_tokens
        done, part = 0, None
        while prefix_len - done > beside_chunk:
            pages_over = -(-(prefix_len - done - beside_chunk) // page_tokens)
            count = min(room, pages_over * page_tokens)
            self._fill(attention, pages, block_table, done, count, sink_row)
            part = _merged(part, dense(query, *self._dense(count), causal=False))
            done += count
        count = prefix_len - done
        if count:
            self._fill(attention, pages, block_table, done, count, sink_row)
        self._keys[0, count : count + num_new] = keys
        self._values[0, count : count + num_new] = values
        part = _merged(part, dense(query, *self._dense(count + num_new), causal=True))
        out.copy_(part[0])

    def _dense(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys[0, :count], self._values[0, :count]

    def _fill(
        self,
        attention: PagedAttention,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        first: int,
        count: int,
        sink_row: torch.Tensor | None,
    ) -> None:
        """Bring back tokens from `first`, where a page begins, on."""
        page_tokens = self._layout.page_tokens
        num_pages = -(-count // page_tokens)
        slots = self._slots[: num_pages * page_tokens]
        if count % page_tokens:
            slots = torch.where(slots < count, slots, -1)
        dequantize_pages(
            pages,
            block_table[first // page_tokens : first // page_tokens + num_pages],
            self._keys,
            self._values,
            slots,
            self._layout,
            key_balance=attention.key_balance,
        )
        if first == 0 and sink_row is not None:
            num_sinks = min(NUM_SINKS, count)
            for dense, kept in ((self._keys, attention.sink_keys), (self._values, attention.sink_values)):
                if kept is not None:
                    raw = kept[sink_row.clamp(min=0).long()][:, :num_sinks].to(dense.dtype)
                    has_row = (sink_row >= 0)[:, None, None, None]
                    dense[:, :num_sinks] = torch.where(has_row, raw, dense[:, :num_sinks])


def _merged(
    before: tuple[torch.Tensor, torch.Tensor] | None, part: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over both of two disjoint sets of tokens."""
    if before is None:
        return part
    lse = torch.logaddexp(before[1], part[1])
    out = sum(side * (side_lse - lse).exp().T[:, :, None] for side, side_lse in (before, part))
    assert isinstance(out, torch.Tensor)  # the sum of two
    return out, lse
