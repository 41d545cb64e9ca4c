"""Where keys and values lie in the pages of an engine that keeps them in bf16 or fp16."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tq_kernels.cache_layers import CacheLayers, cache_layers


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
    """Blocks of one group of an engine's layers, as caches that kernels read and write by tokens' slots.

    A slot is block * block_tokens + offset.

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
    def reading(self, slots: torch.Tensor) -> tuple[CacheLayers, torch.Tensor]:
        """Caches that hold tokens of whole blocks, and ``[num_tokens]`` int64 their slots there.

        Args:
            slots: ``[num_tokens]`` int64.
        """

    @abstractmethod
    def writing(self, slots: torch.Tensor) -> AbstractContextManager[tuple[CacheLayers, torch.Tensor]]:
        """The same for tokens to be written, but for slots of -1; they are in the blocks at the end.

        Args:
            slots: ``[num_tokens]`` int64 of whole blocks, or -1 for all tokens of one.
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

    def reading(self, slots: torch.Tensor) -> tuple[CacheLayers, torch.Tensor]:
        """The blocks themselves."""
        return self._cache, slots

    def writing(self, slots: torch.Tensor) -> AbstractContextManager[tuple[CacheLayers, torch.Tensor]]:
        """The blocks themselves."""
        return nullcontext((self._cache, slots))


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

    def reading(self, slots: torch.Tensor) -> tuple[CacheLayers, torch.Tensor]:
        """Plain rows that these tokens are copied to."""
        tokens, head_dim = self.shape.block_tokens, self.shape.head_dim
        raw = [layer[slots[::tokens] // tokens] for layer in self._layers]
        sides = [
            [
                of_layer[:, :, side, places].unflatten(2, (tokens, head_dim)).transpose(1, 2).contiguous()
                for of_layer in raw
            ]
            for side, places in enumerate(self._places)
        ]
        return cache_layers(*sides), torch.arange(len(slots), device=self.device)

    @contextmanager
    def writing(self, slots: torch.Tensor) -> Iterator[tuple[CacheLayers, torch.Tensor]]:
        """Plain rows that are copied to the blocks."""
        tokens = self.shape.block_tokens
        shape = (len(slots) // tokens, tokens, self.shape.num_kv_heads, self.shape.head_dim)
        rows = [
            [torch.empty(shape, dtype=self.shape.dtype, device=self.device) for _ in self._layers]
            for _ in range(2)
        ]
        yield cache_layers(*rows), torch.arange(len(slots), device=self.device)
        firsts = slots[::tokens]
        wanted = firsts >= 0
        blocks = firsts[wanted] // tokens
        for side, (of_layers, order) in enumerate(zip(rows, self._orders, strict=True)):
            for layer, numbers in zip(self._layers, of_layers, strict=True):
                by_block = numbers[wanted].transpose(1, 2)
                layer[blocks, :, side] = by_block.flatten(2)[..., order]


def token_slots(blocks: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Slots of all tokens of blocks, ``[n * block_tokens]`` int64, -1 for those of a block of -1."""
    offsets = torch.arange(block_tokens, device=blocks.device)
    slots = blocks[:, None] * block_tokens + offsets
    return slots.masked_fill_(blocks[:, None] < 0, -1).flatten()
