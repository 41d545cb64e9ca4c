"""Whole chunks between packed pages and an engine's paged caches: all layers in one launch.

To give a device a launch takes a process longer than the launch of a short chunk takes the device. A save or
a load of one layer after the other would so hold up the engine that it shares the process with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tq_kernels import reference_slots
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import page_shape
from tq_kernels.dequantize_plan import plan_dequantize
from tq_kernels.layout import PageLayout
from tq_kernels.quantize import hopper_packs
from tq_kernels.quantize_plan import plan_quantize

_ALIGNMENT = 16
"""Elements by whose multiples layers are apart, so that kernels read and write 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class CacheLayers:
    """Caches of layers of one shape, and where each lies; `cache_layers` makes it.

    Args:
        keys: ``[num_pages, page_tokens, num_kv_heads, head_dim]`` of each layer.
        values: Likewise.
        offsets: ``[num_layers]`` int64 on the device: elements from the first layer's keys to those of each,
            and the same of values.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    offsets: tuple[torch.Tensor, torch.Tensor]


def cache_layers(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> CacheLayers:
    """The caches of layers, for `quantize_layers` and `dequantize_layers`.

    Args:
        keys: ``[num_pages, page_tokens, num_kv_heads, head_dim]``, bf16, fp16 or fp32, last dimension
            contiguous; every layer the same shape, dtype, device and strides, multiples of 32 or 64 bytes
            apart.
        values: Likewise; their strides are their own.

    Raises:
        ValueError: Layers that differ, or lie elsewhere.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"caches of {len(keys)} keys and {len(values)} values are not those of layers")
    offsets = []
    for name, side in (("key cache", keys), ("value cache", values)):
        first = side[0]
        shape = (None, None, *keys[0].shape[2:])
        for layer in side:
            check_tensor(name, layer, shape, FLOATS, keys[0].device)
            if layer.shape != keys[0].shape or layer.dtype != keys[0].dtype:
                raise ValueError(f"a {name} is not of the shape and dtype of the first")
            if layer.stride() != first.stride():
                raise ValueError(f"a {name} has strides {layer.stride()}, the first {first.stride()}")
        apart = [layer.data_ptr() - first.data_ptr() for layer in side]
        if any(each % (_ALIGNMENT * first.element_size()) for each in apart):
            raise ValueError(f"layers of the {name} are no multiple of {_ALIGNMENT} elements apart")
        elements = [each // first.element_size() for each in apart]
        offsets.append(torch.tensor(elements, dtype=torch.int64, device=first.device))
    return CacheLayers(tuple(keys), tuple(values), (offsets[0], offsets[1]))


def quantize_layers(
    cache: CacheLayers,
    source_slots: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
) -> None:
    """Pack tokens of all layers; every layer is what `quantize_slots` makes of a launch of many tokens.

    Args:
        cache: Where tokens are.
        source_slots: ``[num_tokens]`` int64 token of the cache, cache page * cache page_tokens + offset;
            whether it is in there is not checked.
        slot_mapping: ``[num_tokens]`` int64 where each goes, as in `quantize_slots`.
        pages: ``[num_layers, num_pages, page_bytes]`` uint8; layers may overlap where no slot names a page.
        layout: Page geometry and codec; page_tokens a power of two up to 128.
        key_balance: ``[num_layers, num_kv_heads, head_dim]`` float32, by which keys are divided.

    Raises:
        ValueError: An argument of another shape, dtype or device, or a size that kernels do not serve.
    """
    num_tokens = len(source_slots)
    _check(cache, pages, layout, key_balance)
    for name, slots in (("source_slots", source_slots), ("slot_mapping", slot_mapping)):
        check_tensor(name, slots, (num_tokens,), (torch.int64,), pages.device)
    if not num_tokens:
        return
    if not takes_kernel(pages.device):
        page, offset = source_slots // cache.keys[0].shape[1], source_slots % cache.keys[0].shape[1]
        for number, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            reference_slots.quantize_slots(
                keys[page, offset],
                values[page, offset],
                slot_mapping,
                pages[number],
                layout,
                key_balance=None if key_balance is None else key_balance[number],
            )
        return
    keys, values = cache.keys[0], cache.values[0]
    plan = plan_quantize(
        num_tokens,
        page_shape(layout),
        wide=keys.dtype is torch.float32 or key_balance is not None,
        hopper_pages=hopper_packs(layout, keys, values, key_balance),
        whole=True,
    )
    if plan.variant == "hopper_pages":
        from tq_kernels.hopper_launch_quantize import launch_windows  # Gluon is a part of some releases only

        launch_windows(
            keys,
            values,
            slot_mapping,
            pages,
            layout,
            seed_pages=None,
            key_balance=key_balance,
            sinks=(None, None, None),
            layers=cache.offsets,
            source_slots=source_slots,
        )
        return
    from tq_kernels._launch_quantize import launch_quantize  # Triton is imported where it is used

    launch_quantize(
        plan,
        keys,
        values,
        slot_mapping,
        pages,
        layout,
        seed_pages=None,
        key_balance=key_balance,
        sinks=(None, None, None),
        layers=cache.offsets,
        source_slots=source_slots,
    )


def dequantize_layers(
    pages: torch.Tensor,
    page_indices: torch.Tensor,
    cache: CacheLayers,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
) -> None:
    """Write the tokens of pages into the caches of all layers; other rows of the caches stay as they are.

    Args:
        pages: ``[num_layers, num_pages, page_bytes]`` uint8; layers may overlap.
        page_indices: ``[n]`` int32, pages of every layer to read.
        cache: Where tokens go.
        slot_mapping: ``[n * page_tokens]`` int64 where each token goes, as in `dequantize_pages`.
        layout: Page geometry and codec; page_tokens a power of two up to 128.
        key_balance: ``[num_layers, num_kv_heads, head_dim]`` float32, by which keys are multiplied.

    Raises:
        ValueError: An argument of another shape, dtype or device, or a size that kernels do not serve.
    """
    _check(cache, pages, layout, key_balance)
    check_tensor("page_indices", page_indices, (None,), (torch.int32,), pages.device)
    num_tokens = len(page_indices) * layout.page_tokens
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), pages.device)
    if not num_tokens:
        return
    if not takes_kernel(pages.device):
        for number, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            reference_slots.dequantize_pages(
                pages[number],
                page_indices,
                keys,
                values,
                slot_mapping,
                layout,
                key_balance=None if key_balance is None else key_balance[number],
            )
        return
    from tq_kernels._launch_dequantize import launch_dequantize  # Triton is imported where it is used

    launch_dequantize(
        plan_dequantize(len(page_indices), page_shape(layout), rotated=False),
        pages,
        page_indices,
        cache.keys[0],
        cache.values[0],
        slot_mapping,
        layout,
        key_balance=key_balance,
        rotated=False,
        layers=cache.offsets,
    )


def _check(
    cache: CacheLayers, pages: torch.Tensor, layout: PageLayout, key_balance: torch.Tensor | None
) -> None:
    num_layers, keys = len(cache.keys), cache.keys[0]
    if pages.dim() != 3 or pages.shape[0] != num_layers or pages.stride(0) % 16:
        raise ValueError(
            f"pages must be [{num_layers}, num_pages, {layout.page_bytes}] uint8, layers a multiple of 16 "
            f"bytes apart, not {list(pages.shape)} with strides {pages.stride()}"
        )
    check_pages(pages[0], layout)
    page_shape(layout)
    check_tensor("key cache", keys, (None, None, layout.num_kv_heads, layout.head_dim), FLOATS, pages.device)
    if key_balance is not None:
        shape = (num_layers, layout.num_kv_heads, layout.head_dim)
        check_tensor("key_balance", key_balance, shape, (torch.float32,), pages.device, contiguous_dims=3)
