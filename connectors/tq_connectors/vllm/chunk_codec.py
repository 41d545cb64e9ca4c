"""Chunks of an engine's blocks to cells of bytes and back, on the device that holds the blocks."""

from typing import Protocol

import torch

from tq_connectors.vllm.engine_pages import EnginePages, token_slots
from tq_kernels.cache_layers import dequantize_layers, quantize_layers
from tq_kernels.layout import PageLayout
from tq_store.errors import ConfigError


class ChunkCodec(Protocol):
    """Saves and loads whole chunks; nothing here waits for the device."""

    @property
    def cell_bytes(self) -> int:
        """Bytes that a chunk becomes."""

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks of the engine in a chunk."""

    @property
    def device(self) -> torch.device:
        """Where blocks and cells are."""

    def save(self, blocks: torch.Tensor, cells: torch.Tensor) -> None:
        """Write blocks into cells.

        Args:
            blocks: ``[num_chunks * blocks_per_chunk]`` int64; those of -1 hold nothing that anybody reads.
            cells: ``[num_chunks, cell_bytes]`` uint8, contiguous.
        """

    def load(self, cells: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write cells into blocks, but for those of -1; arguments as in `save`."""


def host_cells(codec: ChunkCodec, host_bytes: int) -> torch.Tensor:
    """``[n, cell_bytes]`` uint8 of host memory for chunks on their way; at least one, as many as fit."""
    cells = max(1, host_bytes // codec.cell_bytes)
    return torch.empty(cells, codec.cell_bytes, dtype=torch.uint8, pin_memory=codec.device.type == "cuda")


class QuantizedChunks:
    """Keys and values to packed pages: a cell holds them layer after layer, of each layer in token order.

    Args:
        pages: The engine's blocks.
        layout: Of packed pages, with the KV heads of this rank.
        pages_per_chunk: Packed pages of a layer in a chunk.
        most_chunks: Chunks that are saved or loaded at once.
        key_balance: ``[num_layers, num_kv_heads, head_dim]`` float32 on the device, or None.

    Raises:
        ConfigError: A chunk is not a whole number of blocks.
    """

    def __init__(
        self,
        pages: EnginePages,
        layout: PageLayout,
        *,
        pages_per_chunk: int,
        most_chunks: int,
        key_balance: torch.Tensor | None = None,
    ) -> None:
        self._pages, self._layout, self._balance = pages, layout, key_balance
        self._pages_per_chunk = pages_per_chunk
        self._chunk_tokens = pages_per_chunk * layout.page_tokens
        if self._chunk_tokens % pages.shape.block_tokens:
            raise ConfigError(
                f"chunks of {self._chunk_tokens} tokens are not made of blocks of {pages.shape.block_tokens}"
            )
        self._cell_pages = pages.num_layers * pages_per_chunk
        in_chunk = torch.arange(pages_per_chunk, device=self.device)
        firsts = torch.arange(most_chunks, device=self.device) * self._cell_pages
        numbers = (firsts[:, None] + in_chunk).flatten()
        self._page_indices = numbers.int()
        offsets = torch.arange(layout.page_tokens, device=self.device)
        self._slots = (numbers[:, None] * layout.page_tokens + offsets).flatten()

    @property
    def cell_bytes(self) -> int:
        """Bytes that a chunk becomes."""
        return self._cell_pages * self._layout.page_bytes

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks of the engine in a chunk."""
        return self._chunk_tokens // self._pages.shape.block_tokens

    @property
    def device(self) -> torch.device:
        """Where blocks and cells are."""
        return self._pages.device

    def save(self, blocks: torch.Tensor, cells: torch.Tensor) -> None:
        """Quantize blocks into cells."""
        slots = token_slots(blocks.clamp(min=0), self._pages.shape.block_tokens)
        cache, sources = self._pages.reading(slots)
        page_slots, pages = self._slots[: len(slots)], self._pages_by_layer(cells)
        quantize_layers(cache, sources, page_slots, pages, self._layout, key_balance=self._balance)

    def load(self, cells: torch.Tensor, blocks: torch.Tensor) -> None:
        """Dequantize cells into blocks."""
        indices = self._page_indices[: len(cells) * self._pages_per_chunk]
        slots = token_slots(blocks, self._pages.shape.block_tokens)
        with self._pages.writing(slots) as (cache, targets):
            dequantize_layers(
                self._pages_by_layer(cells), indices, cache, targets, self._layout, key_balance=self._balance
            )

    def _pages_by_layer(self, cells: torch.Tensor) -> torch.Tensor:
        """Pages of all cells from each layer's first on, so that slots and indices serve every layer."""
        page_bytes, apart = self._layout.page_bytes, self._pages_per_chunk
        num_pages = len(cells) * self._cell_pages - (self._pages.num_layers - 1) * apart
        size = (self._pages.num_layers, num_pages, page_bytes)
        return cells.as_strided(size, (apart * page_bytes, page_bytes, 1))


class CopiedChunks:
    """Blocks as they are: a cell holds them layer after layer, of each layer in token order.

    Args:
        layers: ``[num_blocks, bytes of a block]`` int8 or uint8 of each layer, on one device.
        blocks_per_chunk: Blocks in a chunk.
    """

    def __init__(self, layers: list[torch.Tensor], *, blocks_per_chunk: int) -> None:
        self._layers = [layer.view(torch.uint8) for layer in layers]
        self._blocks_per_chunk = blocks_per_chunk

    @property
    def cell_bytes(self) -> int:
        """Bytes that a chunk becomes."""
        return self._blocks_per_chunk * sum(layer.shape[1] for layer in self._layers)

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks of the engine in a chunk."""
        return self._blocks_per_chunk

    @property
    def device(self) -> torch.device:
        """Where blocks and cells are."""
        return self._layers[0].device

    def save(self, blocks: torch.Tensor, cells: torch.Tensor) -> None:
        """Copy blocks into cells."""
        blocks = blocks.clamp(min=0)
        for layer, part in zip(self._layers, self._parts(cells), strict=True):
            part.copy_(layer[blocks].view(part.shape))

    def load(self, cells: torch.Tensor, blocks: torch.Tensor) -> None:
        """Copy cells into blocks."""
        for layer, part in zip(self._layers, self._parts(cells), strict=True):
            # block 0 is the engine's null block, which nobody reads: where blocks are left out, it takes them
            layer.index_copy_(0, blocks.clamp(min=0), part.reshape(len(blocks), -1))

    def _parts(self, cells: torch.Tensor) -> list[torch.Tensor]:
        return list(cells.split([self._blocks_per_chunk * layer.shape[1] for layer in self._layers], dim=1))
