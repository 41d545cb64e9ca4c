"""Pages of a pool in bf16, fp16 or fp8 that are packed and unpacked on the way, on a device or on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tq_connectors.page_transfer import dequantize_on, quantize_on
from tq_connectors.sglang.packed_pages import PresetCodec
from tq_connectors.sglang.page_copies import copy_all
from tq_kernels import PageLayout, host
from tq_store.keys import Part


class QuantizedCodec(PresetCodec):
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


def wide(dtype: torch.dtype) -> torch.dtype:
    """What pages are dequantized to for a pool of `dtype`."""
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def narrowed(tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dtype`; what an fp8 pool cannot hold becomes the largest number that it can, and not a NaN."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        tokens = tokens.clamp(-largest, largest)
    return tokens.to(dtype)


def _in_memory_order(
    pages: Sequence[torch.Tensor],
) -> tuple[list[int], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Keys and values of pages, turned so that what lies in one run is contiguous; and the order of axes."""
    strides = pages[0].stride()[1:]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    turned = [page.permute(0, *(1 + axis for axis in order)).unbind() for page in pages]
    return order, ([keys for keys, _ in turned], [values for _, values in turned])
