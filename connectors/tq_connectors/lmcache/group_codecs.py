"""Groups of layers to packed pages and back: on the CPU that holds them, or through a GPU.

LMCache's memory is pinned where there is a GPU. So one copy takes all layers there and one brings them back,
each at the speed of the bus, with one launch between them.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Protocol

import torch

from tq_connectors.lmcache.kv_layout import sides
from tq_kernels import PageLayout, host
from tq_kernels.cache_layers import cache_layers, dequantize_layers, quantize_layers

_KEPT_SHAPES = 4
"""Shapes that each thread keeps room on the device for."""


class GroupCodec(Protocol):
    """Packs and unpacks one group of layers; safe to use from several threads."""

    def quantize(self, group: torch.Tensor, balance: torch.Tensor | None, pages: torch.Tensor) -> None:
        """Write the pages of a group.

        Args:
            group: Contiguous, on the CPU, of a shape that `kv_layout.read_layout` knows.
            balance: ``[layers, heads, channels]`` float32 on the CPU, by which keys are divided, or None.
            pages: ``[layers * pages of a layer, page_bytes]`` uint8 on the CPU, contiguous.
        """

    def dequantize(self, pages: torch.Tensor, balance: torch.Tensor | None, group: torch.Tensor) -> None:
        """Fill a group from its pages; arguments as in `quantize`."""


def group_codec(layout: PageLayout, device: torch.device) -> GroupCodec:
    """What packs groups of layers with a device."""
    return _HostGroups(layout) if device.type == "cpu" else DeviceGroups(layout, device)


class _HostGroups:
    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        host.prepare(layout)

    def quantize(self, group: torch.Tensor, balance: torch.Tensor | None, pages: torch.Tensor) -> None:
        keys, values = sides(group, self._layout.num_kv_heads, self._layout.head_dim)
        if balance is not None:
            by_layer = keys.float().view(len(balance), -1, *keys.shape[1:])
            keys = (by_layer / balance[:, None]).flatten(0, 1)
        host.quantize(keys, values, self._layout, pages)

    def dequantize(self, pages: torch.Tensor, balance: torch.Tensor | None, group: torch.Tensor) -> None:
        keys, values = sides(group, self._layout.num_kv_heads, self._layout.head_dim)
        if balance is None:
            host.dequantize(pages, self._layout, keys, values)
            return
        balanced = torch.empty(keys.shape, dtype=torch.float32)
        host.dequantize(pages, self._layout, balanced, values)
        by_layer = balanced.view(len(balance), -1, *keys.shape[1:])
        keys.copy_((by_layer * balance[:, None]).flatten(0, 1))


class DeviceGroups:
    """Groups through a device. Every thread has a stream of its own and room for the last shapes it met."""

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._of_thread = _OfThread(layout, device)

    def quantize(self, group: torch.Tensor, balance: torch.Tensor | None, pages: torch.Tensor) -> None:
        """As `GroupCodec.quantize`."""
        with self._of_thread.own_stream():
            there = self._of_thread.room(group.shape, group.dtype)
            there.group.copy_(group, non_blocking=True)
            there.quantize(self._to_device(balance))
            pages.view(there.pages.shape).copy_(there.pages, non_blocking=True)

    def dequantize(self, pages: torch.Tensor, balance: torch.Tensor | None, group: torch.Tensor) -> None:
        """As `GroupCodec.dequantize`."""
        with self._of_thread.own_stream():
            there = self._of_thread.room(group.shape, group.dtype)
            there.pages.copy_(pages.view(there.pages.shape), non_blocking=True)
            there.dequantize(self._to_device(balance))
            group.copy_(there.group, non_blocking=True)

    def _to_device(self, balance: torch.Tensor | None) -> torch.Tensor | None:
        return None if balance is None else balance.to(self._device)


class DeviceGroup:
    """Room on a device for a group and its pages, and launches between the two, which wait for nothing.

    Args:
        layout: Of the pages.
        device: Where.
        shape: Of the group, one that `kv_layout.read_layout` knows.
        dtype: Of the group.
    """

    def __init__(
        self, layout: PageLayout, device: torch.device, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        num_layers, num_tokens, _ = shape[-3:]
        wide_dtype = dtype if dtype.itemsize > 1 else torch.bfloat16  # which holds every fp8 exactly
        num_pages = num_tokens // layout.page_tokens
        self._layout = layout
        self.group = torch.empty(shape, dtype=dtype, device=device)
        """The group's numbers: what is quantized, or what came out."""
        self.pages = torch.empty(num_layers, num_pages, layout.page_bytes, dtype=torch.uint8, device=device)
        """``[layers, pages of a layer, page_bytes]`` uint8: what is dequantized, or what came out."""
        self._wide = self.group if dtype is wide_dtype else self.group.to(wide_dtype)
        of_layer = (num_layers, 1, num_tokens, layout.num_kv_heads, layout.head_dim)
        keys, values = sides(self._wide, layout.num_kv_heads, layout.head_dim)
        self._cache = cache_layers(keys.view(of_layer).unbind(), values.view(of_layer).unbind())
        self._slots = torch.arange(num_tokens, device=device)
        self._page_indices = torch.arange(num_pages, dtype=torch.int32, device=device)

    def quantize(self, balance: torch.Tensor | None = None) -> None:
        """Make the pages of the group.

        Args:
            balance: ``[layers, heads, channels]`` float32 on the device, by which keys are divided, or None.
        """
        if self._wide is not self.group:
            self._wide.copy_(self.group)
        quantize_layers(self._cache, self._slots, self._slots, self.pages, self._layout, key_balance=balance)

    def dequantize(self, balance: torch.Tensor | None = None) -> None:
        """Make the group out of its pages; arguments as in `quantize`."""
        dequantize_layers(
            self.pages, self._page_indices, self._cache, self._slots, self._layout, key_balance=balance
        )
        if self._wide is not self.group:
            self.group.copy_(self._wide)


class _OfThread(threading.local):
    """What a thread has for itself; it is made anew in every thread that looks."""

    room: Callable[[Sequence[int], torch.dtype], DeviceGroup]

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.room = lru_cache(_KEPT_SHAPES)(partial(DeviceGroup, layout, device))

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Give what follows to the thread's stream; nothing runs on it any more when this has been left."""
        # tensors of inference mode, which the room is made of, can be written in no other
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                if self._stream is not None:
                    self._stream.synchronize()
