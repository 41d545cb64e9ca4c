"""Where keys and values lie in the pages of an engine that keeps them in bf16 or fp16."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tq_kernels.cache_layers import cache_layers, dequantize_layers, quantize_layers
from tq_kernels.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What a block of one layer holds: `num_kv_heads` are those of this rank."""

    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of a block of one layer."""
        return self.block_tokens * self.num_kv_heads * 2 * self.head_dim * self.dtype.itemsize


class EnginePages(ABC):
    """Blocks of one group of an engine's layers, read and written by the slots of their tokens.

    A slot is block * block_tokens + offset. Pages of all layers are ``[num_layers, num_pages, page_bytes]``
    uint8; a balance is ``[num_layers, num_kv_heads, head_dim]`` float32, or None.

    Args:
        layers: Views of each layer, a block a row, as a subclass needs them.
        shape: Of a block.
    """

    def __init__(self, layers: Sequence[torch.Tensor], shape: BlockShape) -> None:
        self._layers, self.shape = layers, shape

    @property
    def num_layers(self) -> int:
        """Layers in the group."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self._layers[0].device

    @abstractmethod
    def save(
        self,
        slots: torch.Tensor,
        pages: torch.Tensor,
        page_slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Pack tokens of all layers.

        Args:
            slots: ``[num_tokens]`` int64 of whole blocks.
            pages: Written.
            page_slots: ``[num_tokens]`` int64 page * page_tokens + offset of each token in every layer.
            layout: Of the pages.
            key_balance: With which to make them.
        """

    @abstractmethod
    def load(
        self,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks of all layers with what packed pages stand for.

        Args:
            pages: Of these blocks, and others.
            page_indices: ``[m]`` int32: the pages of these blocks in every layer, in token order.
            slots: ``[m * page_tokens]`` int64 of whole blocks: where each token of these pages goes, or -1 to
                leave it out.
            layout: Of the pages.
            key_balance: With which they were made.
        """


class StridedPages(EnginePages):
    """Blocks in which every token's keys and values lie next to each other: what vLLM's GPU backends use.

    Args:
        layers: ``[num_blocks, bytes of a block]`` int8 of each layer, a block in one run.
        shape: Of a block.
        head_major: Whether a block holds one head after the other, each with all tokens, or one token after
            the other, each with all heads.
    """

    def __init__(self, layers: Sequence[torch.Tensor], shape: BlockShape, *, head_major: bool) -> None:
        heads, tokens, width = shape.num_kv_heads, shape.block_tokens, 2 * shape.head_dim
        order = (heads, tokens, width) if head_major else (tokens, heads, width)
        views = [layer.view(shape.dtype).unflatten(1, order) for layer in layers]
        super().__init__([view.transpose(1, 2) if head_major else view for view in views], shape)
        sides = [view.split(shape.head_dim, dim=-1) for view in self._layers]
        self._cache = cache_layers([keys for keys, _ in sides], [values for _, values in sides])

    def save(
        self,
        slots: torch.Tensor,
        pages: torch.Tensor,
        page_slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Pack tokens of all layers, in one launch."""
        quantize_layers(self._cache, slots, page_slots, pages, layout, key_balance=key_balance)

    def load(
        self,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks of all layers, in one launch."""
        dequantize_layers(pages, page_indices, self._cache, slots, layout, key_balance=key_balance)


class PermutedPages(EnginePages):
    """Blocks of which every head holds all keys, then all values, each in an order of the backend's own.

    Args:
        layers: ``[num_blocks, bytes of a block]`` int8 of each layer, a block in one run.
        shape: Of a block.
        key_order: ``[block_tokens * head_dim]`` int64: which number, token * head_dim + channel, lies where.
        value_order: The same for values.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        shape: BlockShape,
        key_order: torch.Tensor,
        value_order: torch.Tensor,
    ) -> None:
        parts = (shape.num_kv_heads, 2, shape.block_tokens * shape.head_dim)
        super().__init__([layer.view(shape.dtype).unflatten(1, parts) for layer in layers], shape)
        self._orders = (key_order, value_order)
        self._places = tuple(order.argsort() for order in self._orders)

    def save(
        self,
        slots: torch.Tensor,
        pages: torch.Tensor,
        page_slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Pack tokens of all layers, by way of plain rows."""
        tokens, head_dim = self.shape.block_tokens, self.shape.head_dim
        raw = [layer[slots[::tokens] // tokens] for layer in self._layers]
        sides = [
            [
                of_layer[:, :, side, places].unflatten(2, (tokens, head_dim)).transpose(1, 2).contiguous()
                for of_layer in raw
            ]
            for side, places in enumerate(self._places)
        ]
        every_row = torch.arange(len(slots), device=self.device)
        rows = cache_layers(*sides)
        quantize_layers(rows, every_row, page_slots, pages, layout, key_balance=key_balance)

    def load(
        self,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks of all layers, by way of plain rows."""
        tokens = self.shape.block_tokens
        shape = (len(page_indices), layout.page_tokens, layout.num_kv_heads, layout.head_dim)
        rows = [
            [torch.empty(shape, dtype=self.shape.dtype, device=self.device) for _ in self._layers]
            for _ in range(2)
        ]
        every_row = torch.arange(shape[0] * shape[1], device=self.device)
        dequantize_layers(
            pages, page_indices, cache_layers(*rows), every_row, layout, key_balance=key_balance
        )
        firsts = slots[::tokens]
        wanted = firsts >= 0
        blocks = firsts[wanted] // tokens
        for side, (of_layers, order) in enumerate(zip(rows, self._orders, strict=True)):
            for layer, numbers in zip(self._layers, of_layers, strict=True):
                by_block = numbers.view(len(firsts), tokens, *shape[2:])[wanted].transpose(1, 2)
                layer[blocks, :, side] = by_block.flatten(2)[..., order]


def token_slots(blocks: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Slots of all tokens of blocks, ``[n * block_tokens]`` int64, -1 for those of a block of -1."""
    offsets = torch.arange(block_tokens, device=blocks.device)
    slots = blocks[:, None] * block_tokens + offsets
    return slots.masked_fill_(blocks[:, None] < 0, -1).flatten()
