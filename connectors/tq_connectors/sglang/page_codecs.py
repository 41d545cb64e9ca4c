"""Pages of keys and values of all layers of a process to the bytes that are stored and back."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from tq_connectors.codec import CacheGeometry, block_info
from tq_connectors.page_transfer import dequantize_on, quantize_on
from tq_connectors.sglang.page_shape import PageShape
from tq_kernels import PageLayout, host
from tq_store.block import BlockInfo
from tq_store.keys import BlockKey, Part, part_key, split_key

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


class _PresetCodec:
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

    def empty(self, num_pages: int) -> torch.Tensor:
        """Memory ``[n, num_bytes]`` uint8."""
        return torch.empty(num_pages, self._num_layers * self._layout.page_bytes, dtype=torch.uint8)


class PackedCodec(_PresetCodec):
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
        storage = page.untyped_storage()
        address, memory = self._memory
        if address != storage.data_ptr():
            memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
            self._memory = storage.data_ptr(), memory
        first, num_bytes = page.storage_offset(), self._layout.page_bytes
        starts = [
            first + layer % 2 * between_sides + layer // 2 * between_pairs
            for layer in range(self._num_layers)
        ]
        return [memory[start : start + num_bytes] for start in starts]

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


class QuantizedCodec(_PresetCodec):
    """Keys and values that are packed on the way, on a device or on the CPU.

    Args:
        layout: Page of the whole model, all its KV heads.
        num_layers: Attention layers of the whole model.
        part: What the process holds.
        device: Where packing runs.
        key_balance: ``[layers, heads, channels]`` float32 on the CPU, by which the keys of the process are
            divided before they are quantized; None for no balance.
    """

    def __init__(
        self,
        layout: PageLayout,
        num_layers: int,
        part: Part,
        device: torch.device,
        key_balance: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layout, num_layers, part)
        self._device = device
        self._balance = None if key_balance is None else key_balance[:, None].to(device)
        self._on_host = device.type == "cpu"
        if self._on_host:
            host.prepare(layout)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, num_pages: int) -> torch.Tensor:
        """Memory ``[n, num_bytes]`` uint8, pinned where a device reads it."""
        shape = (num_pages, self._num_layers * self._layout.page_bytes)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)

    def pack(self, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 of n pages."""
        with self._own_stream():
            order, sides = _in_memory_order(pages)
            keys, values = (self._gathered(runs, order) for runs in sides)
            return self._pack_tokens(keys, values)

    def unpack(self, stored: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """Fill pages from the packed ones. None is written after this, whether it returns or raises."""
        with self._own_stream():
            keys, values = self._dequantize(stored.view(-1, self._layout.page_bytes), wide(pages[0].dtype))
            shape = (len(pages), *pages[0].shape[1:])
            keys, values = keys.view(shape), values.view(shape)
            if self._balance is not None:
                keys = keys * self._balance
            order, sides = _in_memory_order(pages)
            for targets, tokens in zip(sides, (keys, values), strict=True):
                turned = narrowed(tokens, pages[0].dtype).permute(0, *(1 + axis for axis in order))
                copy_all(targets, turned.contiguous().unbind())

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A stream of ours, where there are streams; nothing runs on it any more when this has been left."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                if self._stream is not None:
                    self._stream.synchronize()

    def _gathered(self, runs: Sequence[torch.Tensor], order: Sequence[int]) -> torch.Tensor:
        """``[n, layers, tokens, heads, channels]`` on the device, of runs that are turned like `order`."""
        gathered = torch.empty(len(runs), *runs[0].shape, dtype=runs[0].dtype, device=self._device)
        copy_all(gathered.unbind(), runs)
        return gathered.permute(0, *(1 + order.index(axis) for axis in range(len(order))))

    def _pack_tokens(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Bytes ``[n, num_bytes]`` uint8 on the CPU of ``[n, layers, tokens, heads, channels]``."""
        num_pages = keys.shape[0]
        if self._balance is not None:
            keys, values = keys.float() / self._balance, values.float()
        keys, values = keys.flatten(0, 2), values.flatten(0, 2)
        packed = self.empty(num_pages)
        if self._on_host:
            host.quantize(keys, values, self._layout, packed.view(-1, self._layout.page_bytes))
        else:
            packed.copy_(quantize_on(self._device, keys, values, self._layout).view(packed.shape))
        return packed

    def _dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._on_host:
            return dequantize_on(self._device, packed, self._layout, dtype)
        shape = (packed.shape[0] * self._layout.page_tokens, self._layout.num_kv_heads, self._layout.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype) for _ in range(2))
        host.dequantize(packed, self._layout, keys, values)
        return keys, values


def _by_head(page: torch.Tensor) -> np.ndarray[Any, Any]:
    """A page as bytes ``[layers, heads, 2, tokens, bytes of a token]``; a view."""
    return page.view(torch.uint8).numpy().transpose(1, 3, 0, 2, 4)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What pages are dequantized to for a pool of `dtype`."""
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def narrowed(tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dtype`; what an fp8 pool cannot hold becomes the largest number that it can, and not a NaN."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        tokens = tokens.clamp(-largest, largest)
    return tokens.to(dtype)


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors to others of their shape and dtype.

    In an engine whose scheduler never rests, each call of torch costs us its wait for the interpreter's lock.
    So a device gets all copies in one call. In host memory numpy does them, as torch would share each of
    these small copies out to all cores, and wait for the last of them.
    """
    if not targets:
        return
    if targets[0].device.type == sources[0].device.type == "cpu":
        for target, source in zip(targets, sources, strict=True):
            target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        torch._foreach_copy_([*targets], [*sources], non_blocking=True)


def _in_memory_order(
    pages: Sequence[torch.Tensor],
) -> tuple[list[int], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Keys and values of pages, turned so that what lies in one run is contiguous; and the order of axes."""
    strides = pages[0].stride()[1:]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    turned = [page.permute(0, *(1 + axis for axis in order)).unbind() for page in pages]
    return order, ([keys for keys, _ in turned], [values for _, values in turned])
