"""The layers that share a block table: their attention on pages, and the raw first tokens of sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.opened_pages import OpenedPages
from tq_connectors.engine.sink_pool import NUM_SINKS, SinkPool, rows_for
from tq_kernels.layout import PageLayout
from tq_kernels.step import prepare_step


def pages_of(kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """What vLLM sees as ``[pages, heads, tokens, bytes]``, as the ``[pages, page_bytes]`` that it is.

    Whatever the order of the middle dimensions, the bytes of a page lie together: the backend takes no other
    layout.
    """
    return kv_cache.as_strided((len(kv_cache), layout.page_bytes), (kv_cache.stride(0), 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStep:
    """What `prepare_step` says of a step, in buffers that stay where they are.

    Args:
        seed_pages: ``[num_tokens]`` int32.
        sink_slots: ``[num_tokens]`` int32.
        sink_rows: ``[num_seqs]`` int32.
        begins: ``[num_seqs]`` bool, sequences that begin in this step, or None where none does.
        first_pages: ``[num_seqs]`` int32, the first page of each sequence.
    """

    seed_pages: torch.Tensor
    sink_slots: torch.Tensor
    sink_rows: torch.Tensor
    begins: torch.Tensor | None
    first_pages: torch.Tensor


class LayerGroup:
    """Layers of one group, and where the first tokens of its sequences are kept.

    Args:
        layers: vLLM's layers by name, in the model's order; their `impl` is ours.
        known: All layers by name, with those that vLLM adds to a group later.
        keeps_sinks: Whether first tokens are kept raw: not where a connector may fill pages after a step was
            prepared.
        layout: Of the pages of each.
        key_balances: For each layer ``[num_kv_heads, head_dim]`` float32 by which keys are divided, or None.
        max_seqs: Most sequences of a step.
        max_tokens: Most tokens of a step.
        dtype: Of the model.
        device: Where it runs.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        layout: PageLayout,
        *,
        known: Mapping[str, Any],
        keeps_sinks: bool,
        key_balances: Sequence[torch.Tensor | None],
        max_seqs: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self._known = known
        self._keeps_sinks = keeps_sinks
        self._first_name, self._first_layer = next(iter(layers.items()))
        self._pool = SinkPool(
            layout, num_layers=len(layers), num_rows=rows_for(max_seqs), dtype=dtype, device=device
        )
        self._attentions: dict[str, PagedAttention] = {
            name: layer.impl.on_pages(
                layout,
                sink_keys=self._pool.keys[index],
                sink_values=self._pool.values[index],
                key_balance=None if balance is None else balance.to(device),
            )
            for index, ((name, layer), balance) in enumerate(zip(layers.items(), key_balances, strict=True))
        }
        self._opened: OpenedPages | None = None
        self._seed_pages = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self._sink_slots = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self._sink_rows = torch.full((max_seqs,), -1, dtype=torch.int32, device=device)

    def attention(self, layer_name: str) -> PagedAttention:
        """A layer's attention; one that was added later has no raw sinks, and no balance."""
        if layer_name not in self._attentions:
            impl = self._known[layer_name].impl
            self._attentions[layer_name] = impl.on_pages(
                self.layout, sink_keys=None, sink_values=None, key_balance=None
            )
        return self._attentions[layer_name]

    def prepare(
        self,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        query_start: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        opens: bool,
        num_decodes: int,
        num_decode_tokens: int,
    ) -> PageStep:
        """Before a step: where its pages take their centres from, where its sequences keep first tokens.

        Args:
            block_table: ``[num_seqs, max_pages]`` int32.
            lengths: ``[num_seqs]`` int32 tokens of each sequence, those of the step included.
            query_start: ``[num_seqs + 1]`` int32 first token of each, then their end.
            slot_mapping: ``[num_tokens]`` int64 slots of the step's tokens, with those that fill up a graph.
            opens: Whether a sequence begins.
            num_decodes: Sequences at the head of the batch that bring the tokens of a decode.
            num_decode_tokens: Their tokens.
        """
        pages = pages_of(self._first_layer.kv_cache, self.layout)
        table = self._pool.table
        if table is None or len(table.row_of_page) != len(pages):
            table = self._pool.bind(len(pages))
        first_pages, begins, num_tokens = block_table[:, 0], None, len(slot_mapping)
        opens = opens and self._keeps_sinks
        if opens:
            counts = query_start[1:] - query_start[:-1]
            # fewer tokens than a row has would mark it with what others may begin with as well; vLLM's trial
            # runs stand on the null block, and are nobody
            begins = (counts >= NUM_SINKS) & (lengths == counts) & (first_pages != NULL_BLOCK_ID)
            begins[:num_decodes] = False
            self._pool.open_rows(first_pages, begins)
        step = PageStep(
            seed_pages=self._seed_pages[:num_tokens],
            sink_slots=self._sink_slots[:num_tokens],
            sink_rows=self._sink_rows[: len(lengths)],
            begins=begins,
            first_pages=first_pages,
        )
        clock = self._pool.tick()
        prepare_step(
            block_table,
            lengths,
            query_start,
            self.layout,
            seed_pages=step.seed_pages,
            sinks=table,
            pages=pages,
            sink_slots=step.sink_slots,
            sink_rows=step.sink_rows,
            num_sinks=NUM_SINKS,
            clock=clock,
            opens=opens,
        )
        if num_decodes < len(lengths):
            if self._opened is None or self._opened.num_pages != len(pages):
                self._opened = OpenedPages(len(pages), self.layout.page_tokens, pages.device)
            self._opened.drop(step.seed_pages, slot_mapping, clock, num_decode_tokens=num_decode_tokens)
        return step

    def after_write(self, layer_name: str, pages: torch.Tensor, step: PageStep) -> None:
        """Once a layer's tokens are in its pages: remember, in the first one, what rows belong to."""
        if step.begins is not None and layer_name == self._first_name:
            self._pool.mark_rows(pages, step.first_pages, step.begins, step.sink_rows)
