"""Pages in the format of a preset that the engine's own pool holds packed already."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tq_connectors.codec import block_info
from tq_connectors.sglang.page_copies import copy_all
from tq_kernels import PageLayout
from tq_store.block import BlockInfo
from tq_store.keys import BlockKey, Part
from tq_store.placed import Copy


class PresetCodec:
    """Pages in the format of a preset.

    Args:
        layout: Page of the whole model, all its KV heads.
        num_layers: Attention layers of the whole model.
        part: What the process holds.
    """

    def __init__(self, layout: PageLayout, num_layers: int, part: Part) -> None:
        self._whole_layout = layout
        self._layout = replace(layout, num_kv_heads=part.num_kv_heads)
        self._total_layers = num_layers
        self._num_layers = part.num_layers
        self.section_bytes = layout.section_bytes

    @property
    def fingerprint(self) -> str:
        """Hex digest over the codec."""
        return self._layout.spec.fingerprint.hex()

    def info(self, page_key: BlockKey, part: Part) -> BlockInfo:
        """Header of the block that holds a part of a page."""
        return block_info(self._whole_layout, self._total_layers, page_key, part)

    def pieces(self, page: torch.Tensor) -> list[memoryview] | None:
        """Nowhere, unless a page is packed already."""
        return None

    def copy_to(self, page: torch.Tensor) -> Copy | None:
        """Nothing, unless a page is packed already."""
        return None

    def empty(self, num_pages: int) -> torch.Tensor:
        """Memory ``[n, num_bytes]`` uint8."""
        return torch.empty(num_pages, self._num_layers * self._layout.page_bytes, dtype=torch.uint8)


class PackedCodec(PresetCodec):
    """Pages that the engine has packed already, two layers in the place of keys and values of one.

    How they lie in the pool is said in `page_rows`.
    """

    def __init__(self, layout: PageLayout, num_layers: int, part: Part) -> None:
        super().__init__(layout, num_layers, part)
        self._memory = (0, memoryview(b""))

    def pieces(self, page: torch.Tensor) -> list[memoryview] | None:
        """The layers of a page, where a host pool keeps each in one run.

        They are cut from a view of the whole pool, as to ask numpy for each takes ten times as long.
        """
        between_sides, between_pairs, *within = page.stride()
        num_heads, row_bytes = page.shape[3:]
        if within != [num_heads * row_bytes, row_bytes, 1]:
            return None
        memory = self._memory_of(page)
        first, num_bytes = page.storage_offset(), self._layout.page_bytes
        starts = [
            first + layer % 2 * between_sides + layer // 2 * between_pairs
            for layer in range(self._num_layers)
        ]
        return [memory[start : start + num_bytes] for start in starts]

    def copy_to(self, page: torch.Tensor) -> Copy:
        """Copies all layers in one call without the interpreter's lock, the last of an odd number alone."""
        memory, (between_sides, between_pairs, *strides) = self._memory_of(page), page.stride()
        first, shape = page.storage_offset(), page.shape[2:]
        num_pairs, num_odd = divmod(self._num_layers, 2)
        all_strides = (between_pairs, between_sides, *strides)

        def copy(payload: memoryview) -> None:
            layers = np.frombuffer(payload, np.uint8).reshape(self._num_layers, *shape)
            pairs = layers[: 2 * num_pairs].reshape(num_pairs, 2, *shape)
            np.ndarray(pairs.shape, np.uint8, memory, first, all_strides)[...] = pairs
            if num_odd:
                offset = first + num_pairs * between_pairs
                np.ndarray(shape, np.uint8, memory, offset, strides)[...] = layers[-1]

        return copy

    def _memory_of(self, page: torch.Tensor) -> memoryview:
        """All bytes of the pool of a page; asked of numpy once."""
        storage = page.untyped_storage()
        address, memory = self._memory
        if address != storage.data_ptr():
            memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
            self._memory = storage.data_ptr(), memory
        return memory

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages."""
        packed = self.empty(len(pages))
        of_pages, in_order = self._halves(packed, pages)
        copy_all(in_order, of_pages)
        return packed

    def unpack(self, stored: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """Fill pages; each byte is copied once."""
        copy_all(*self._halves(stored, pages))

    def _halves(
        self, stored: torch.Tensor, pages: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Even layers and odd ones of each page, as the engine has them and as they are stored."""
        layers = stored.view(len(pages), self._num_layers, *pages[0].shape[2:])
        in_order = [row[side::2] for row in layers for side in range(2)]
        of_pages = [page[side] for page in pages for side in range(2)]
        return [half[: len(own)] for half, own in zip(of_pages, in_order, strict=True)], in_order
