"""Where keys and values lie in the pages of an engine that keeps them in bf16 or fp16."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tq_kernels.dequantize import dequantize_pages
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
    """Blocks of one group of an engine's layers, read and written by their numbers.

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
    def gather(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Keys and values of blocks.

        Args:
            layer: Which of the group's layers.
            blocks: ``[n]`` int64.
            out: ``[n, block_tokens, num_kv_heads, 2 * head_dim]``: keys, then values of each head.
        """

    @abstractmethod
    def restore(
        self,
        layer: int,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks with what packed pages stand for.

        Args:
            layer: Which of the group's layers.
            pages: ``[num_pages, page_bytes]`` uint8.
            page_indices: ``[m]`` int32: the pages of these blocks, in token order.
            slots: ``[m * page_tokens]`` int64 of whole blocks, block * block_tokens + offset: where each
                token of these pages goes, or -1 to leave it out.
            layout: Of the pages.
            key_balance: ``[num_kv_heads, head_dim]`` float32 that the pages were made with, if any.
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

    def gather(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Keys and values of blocks."""
        torch.index_select(self._layers[layer], 0, blocks, out=out)

    def restore(
        self,
        layer: int,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks with what packed pages stand for, in one launch."""
        keys, values = self._layers[layer].split(self.shape.head_dim, dim=-1)
        dequantize_pages(pages, page_indices, keys, values, slots, layout, key_balance=key_balance)


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

    def gather(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Keys and values of blocks."""
        raw, head_dim = self._layers[layer][blocks], self.shape.head_dim
        for side, places in enumerate(self._places):
            numbers = raw[:, :, side, places].unflatten(2, (self.shape.block_tokens, head_dim))
            out[..., side * head_dim : (side + 1) * head_dim] = numbers.transpose(1, 2)

    def restore(
        self,
        layer: int,
        pages: torch.Tensor,
        page_indices: torch.Tensor,
        slots: torch.Tensor,
        layout: PageLayout,
        key_balance: torch.Tensor | None,
    ) -> None:
        """Fill blocks with what packed pages stand for, by way of plain rows."""
        tokens = self.shape.block_tokens
        rows = (len(page_indices), layout.page_tokens, layout.num_kv_heads, layout.head_dim)
        keys, values = (torch.empty(rows, dtype=self.shape.dtype, device=self.device) for _ in range(2))
        every_row = torch.arange(rows[0] * rows[1], device=self.device)
        dequantize_pages(pages, page_indices, keys, values, every_row, layout, key_balance=key_balance)
        firsts = slots[::tokens]
        wanted = firsts >= 0
        blocks = firsts[wanted] // tokens
        for side, (numbers, order) in enumerate(zip((keys, values), self._orders, strict=True)):
            by_block = numbers.view(len(firsts), tokens, *rows[2:])[wanted].transpose(1, 2)
            self._layers[layer][blocks, :, side] = by_block.flatten(2)[..., order]


def token_slots(blocks: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Slots of all tokens of blocks, ``[n * block_tokens]`` int64, -1 for those of a block of -1."""
    offsets = torch.arange(block_tokens, device=blocks.device)
    slots = blocks[:, None] * block_tokens + offsets
    return slots.masked_fill_(blocks[:, None] < 0, -1).flatten()
