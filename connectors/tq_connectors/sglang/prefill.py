"""Prefill: attention of new tokens among themselves and, over pages, to the prefixes before them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import Inflater
from tq_connectors.engine.warm_up import compile_kernels
from tq_connectors.sglang.fresh import FreshAttention
from tq_connectors.sglang.segments import Kind, Segment
from tq_connectors.sglang.steps import Batch
from tq_kernels.extend_attention import ExtendWorkspace, extend_workspace
from tq_kernels.extend_plan import WORKSPACE_TOKENS
from tq_kernels.layout import PageLayout


class Prefill:
    """Serves the segments of batches, all layers in turn.

    Args:
        layout: Of the pages.
        max_tokens: Tokens of the longest prefix.
        dtype: Of the model.
        device: Where the pages are.
        fresh: What attends among new tokens of sequences without a prefix, and over prefixes made dense; None
            for `tq_kernels`.
    """

    def __init__(
        self,
        layout: PageLayout,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        fresh: FreshAttention | None,
    ) -> None:
        self._layout = layout
        self._max_tokens = max_tokens
        self._device = device
        self._fresh_attention = fresh
        self._workspace: ExtendWorkspace | None = None
        self._inflater = None
        if fresh is not None:
            self._inflater = Inflater(layout, dtype=dtype, device=device, max_tokens=max_tokens)

    def compile_kernels(
        self, layers: Iterable[PagedAttention], num_query_heads: int, dtype: torch.dtype
    ) -> None:
        """Compile what passes of layers launch, before one of them has to wait for it."""
        fresh = self._fresh_attention
        compile_kernels(
            [(layer, None if fresh is None else partial(_dense, fresh, layer)) for layer in layers],
            num_query_heads=num_query_heads,
            dtype=dtype,
            device=self._device,
            inflater=self._inflater,
            workspace=self._room(),
        )

    def attend(
        self,
        attention: PagedAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        batch: Batch,
        out: torch.Tensor,
    ) -> None:
        """All segments of a batch.

        Args:
            attention: The layer.
            query: ``[num_tokens, num_query_heads, head_dim]``.
            keys: ``[num_tokens, num_kv_heads, head_dim]``, written to their pages already.
            values: The same shape.
            pages: The layer's pool.
            batch: Of this pass.
            out: Written: the query's shape; zeros where a token belongs to no sequence.
        """
        for segment in batch.segments:
            new = segment.tokens
            tokens = (query[new], keys[new], values[new], out[new])
            if segment.kind is Kind.SHORT:
                continue
            if segment.kind is Kind.FRESH and self._fresh_attention is not None:
                self._fresh(self._fresh_attention, attention, *tokens, batch, segment)
            else:
                self._one_by_one(attention, *tokens, pages, batch, segment)
        if batch.short is not None:
            batch.short.attend(attention, query, pages, out)
        end = batch.segments[-1].tokens.stop if batch.segments else 0
        out[end:].zero_()

    def _fresh(
        self,
        fresh: FreshAttention,
        attention: PagedAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        batch: Batch,
        segment: Segment,
    ) -> None:
        starts = batch.query_start[segment.rows.start : segment.rows.stop + 1] - segment.tokens.start
        longest = max(segment.new_lens)
        options = _options(attention, causal=True)
        fresh(query, keys, values, starts, starts, longest, longest, **options, out=out)

    def _one_by_one(
        self,
        attention: PagedAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        pages: torch.Tensor,
        batch: Batch,
        segment: Segment,
    ) -> None:
        workspace = self._room()
        for place, (start, end) in enumerate(segment.spans):
            row, prefix_len = segment.rows.start + place, segment.prefix_lens[place]
            new = (query[start:end], keys[start:end], values[start:end])
            cached = (pages, batch.block_table[row], prefix_len)
            sink_row = batch.sink_rows[row : row + 1]
            fresh, inflater = self._fresh_attention, self._inflater
            if fresh and inflater and inflater.serves(attention, end - start, prefix_len):
                dense = partial(_dense, fresh, attention)
                inflater.attend(attention, dense, *new, *cached, sink_row=sink_row, out=out[start:end])
                continue
            attention.extend(*new, *cached, sink_row=sink_row, workspace=workspace, out=out[start:end])

    def _room(self) -> ExtendWorkspace:
        if self._workspace is None:
            tokens = min(WORKSPACE_TOKENS, self._max_tokens)
            self._workspace = extend_workspace(self._layout, tokens, self._device)
        return self._workspace


def _options(attention: PagedAttention, *, causal: bool) -> dict[str, Any]:
    """What a layer asks of FlashAttention."""
    window = attention.sliding_window
    return {
        "softmax_scale": attention.softmax_scale,
        "causal": causal,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": attention.softcap or 0.0,
    }


def _dense(
    fresh: FreshAttention,
    attention: PagedAttention,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, as `inflate.DenseAttention` has it."""
    ends = torch.arange(2, dtype=torch.int32, device=query.device)
    starts = (ends * len(query), ends * len(keys))
    longest = (len(query), len(keys))
    options = _options(attention, causal=causal)
    out, lse, *_ = fresh(query, keys, values, *starts, *longest, **options, return_softmax_lse=True)
    return out, lse
