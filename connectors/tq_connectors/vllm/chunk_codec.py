"""Chunks of an engine's blocks to cells of bytes and back, on the device that holds the blocks."""

from typing import Protocol

import torch

from tq_connectors.vllm.engine_pages import EnginePages, token_slots
from tq_kernels.layout import PageLayout
from tq_kernels.quantize import quantize_slots
from tq_store.errors import ConfigError

_SEARCHED_TOKENS = 640
"""Tokens of a launch in which `quantize_slots` searches the best cell size; fewer are filled up to these."""


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
        rows = max(most_chunks * self._chunk_tokens, _SEARCHED_TOKENS)
        self._rows = torch.empty(
            rows, layout.num_kv_heads, 2 * layout.head_dim, dtype=pages.shape.dtype, device=self.device
        )

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
        """Quantize blocks into cells, a layer at a time."""
        num_tokens = len(cells) * self._chunk_tokens
        blocks = blocks.clamp(min=0)
        num_rows = max(num_tokens, _SEARCHED_TOKENS)
        slots = torch.full((num_rows,), -1, device=self.device)
        slots[:num_tokens] = self._slots[:num_tokens]
        rows = self._rows[:num_rows]
        gathered = rows[:num_tokens].view(len(blocks), self._pages.shape.block_tokens, *rows.shape[1:])
        keys, values = rows.split(self._layout.head_dim, dim=-1)
        for layer in range(self._pages.num_layers):
            self._pages.gather(layer, blocks, gathered)
            pages = self._pages_of(layer, cells)
            quantize_slots(keys, values, slots, pages, self._layout, key_balance=self._balance_of(layer))

    def load(self, cells: torch.Tensor, blocks: torch.Tensor) -> None:
        """Dequantize cells into blocks, a layer at a time."""
        indices = self._page_indices[: len(cells) * self._pages_per_chunk]
        slots = token_slots(blocks, self._pages.shape.block_tokens)
        for layer in range(self._pages.num_layers):
            pages = self._pages_of(layer, cells)
            self._pages.restore(layer, pages, indices, slots, self._layout, self._balance_of(layer))

    def _pages_of(self, layer: int, cells: torch.Tensor) -> torch.Tensor:
        """Pages of all cells from this layer's first on, so that slots and indices serve every layer."""
        return cells.view(-1, self._layout.page_bytes)[layer * self._pages_per_chunk :]

    def _balance_of(self, layer: int) -> torch.Tensor | None:
        return None if self._balance is None else self._balance[layer]


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
