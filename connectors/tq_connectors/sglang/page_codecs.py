"""What makes stored bytes of a page of all layers of a process, and the page of them; the plainest codec."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang.page_shape import PageShape
from tq_store.block import BlockInfo
from tq_store.keys import BlockKey, Part, part_key, split_key
from tq_store.placed import Copy

ROWS_CODEC_ID = 5
"""A block of keys and values as the engine has them; `proto/BLOCK_FORMAT.md` lists it."""


class PageCodec(Protocol):
    """What a page store needs to make blocks of pages, and pages of blocks.

    A page is a view ``[2, layers, tokens, heads, elements]`` on the CPU, of any strides but for its elements,
    which are contiguous. Its bytes in the store are sections, one for each layer and head, in that order.
    """

    @property
    def section_bytes(self) -> int:
        """Bytes of one head in one layer of a page."""

    @property
    def fingerprint(self) -> str:
        """Hex digest over what decides the bytes besides the page's shape."""

    def info(self, page_key: BlockKey, part: Part) -> BlockInfo:
        """Header of the block that holds a part of a page."""

    def pieces(self, page: torch.Tensor) -> list[memoryview] | None:
        """Where a page's bytes lie in the page itself, in their order; None where they must be made."""

    def copy_to(self, page: torch.Tensor) -> Copy | None:
        """What copies a page's bytes in the store into it in a few steps; None where nothing does."""

    def empty(self, num_pages: int) -> torch.Tensor:
        """Memory ``[n, num_bytes]`` uint8 for the bytes of n pages, to be unpacked."""

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages."""

    def unpack(self, stored: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """Fill pages from their bytes, ``[n, num_bytes]`` as `empty` makes it."""


class RowCodec:
    """Keys and values as they are.

    Args:
        geometry: Shape of the whole model's cache.
        shape: A page in the engine.
    """

    def __init__(self, geometry: CacheGeometry, shape: PageShape) -> None:
        self._whole = geometry.whole
        self._shape = shape
        self._digest = hashlib.sha256(f"rows v1 {shape.dtype_name}".encode()).digest()
        self.section_bytes = 2 * shape.page_tokens * shape.head_dim * shape.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        """Hex digest over the dtype."""
        return self._digest.hex()

    def info(self, page_key: BlockKey, part: Part) -> BlockInfo:
        """Header of the block that holds a part of a page."""
        namespace, prefix_hash = split_key(part_key(page_key, part, self._whole))
        return BlockInfo(
            namespace=namespace,
            prefix_hash=prefix_hash,
            codec_fingerprint=self._digest,
            rotation_seed=0,
            codec_id=ROWS_CODEC_ID,
            packing_id=0,
            key_code=0,
            value_code=0,
            rotation_id=0,
            key_center=0,
            page_bytes=self.section_bytes * part.num_kv_heads,
            num_tokens=self._shape.page_tokens,
            page_tokens=self._shape.page_tokens,
            head_dim=self._shape.head_dim,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            first_kv_head=part.first_kv_head,
            num_kv_heads=part.num_kv_heads,
            total_kv_heads=self._whole.num_kv_heads,
        )

    def pieces(self, page: torch.Tensor) -> list[memoryview] | None:
        """Nowhere: a page in the engine is not in the order of heads."""
        return None

    def copy_to(self, page: torch.Tensor) -> Copy | None:
        """Nothing; they go through a row."""
        return None

    def empty(self, num_pages: int) -> torch.Tensor:
        """Memory ``[n, num_bytes]`` uint8."""
        return torch.empty(num_pages, self._shape.page_bytes, dtype=torch.uint8)

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages."""
        packed = self.empty(len(pages))
        for row, page in zip(packed.numpy(), pages, strict=True):
            by_head = _by_head(page)
            row.reshape(by_head.shape)[...] = by_head
        return packed

    def unpack(self, stored: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """Fill pages; each byte is copied once."""
        for row, page in zip(stored.numpy(), pages, strict=True):
            by_head = _by_head(page)
            by_head[...] = row.reshape(by_head.shape)


def _by_head(page: torch.Tensor) -> np.ndarray[Any, Any]:
    """A page as bytes ``[layers, heads, 2, tokens, bytes of a token]``; a view."""
    return page.view(torch.uint8).numpy().transpose(1, 3, 0, 2, 4)
