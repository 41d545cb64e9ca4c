"""Dequantize: packed pages back to rows of an engine's paged cache, in one launch.

A key is Rᵀ (c + scale L) and a value Rᵀ (scale L), with R the rotation, c the centre of the page and L the
levels; or, for readers that work in the rotated domain, the same without Rᵀ, which is no matrix product and
runs at the speed of memory. `kernels/README.md` derives it; `reference_slots.py` is the same in PyTorch.
"""

import torch

from tq_kernels import reference_slots
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import page_shape
from tq_kernels.dequantize_plan import plan_dequantize
from tq_kernels.layout import PageLayout


def dequantize_pages(
    pages: torch.Tensor,
    page_indices: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
    rotated: bool = False,
) -> None:
    """Write the tokens of pages into an engine's cache, in place; other rows of the cache stay as they are.

    Nothing is allocated after the first call for a layout, and nothing waits for the device: later calls may
    be captured in a CUDA graph.

    Args:
        pages: ``[num_pages, page_bytes]`` uint8.
        page_indices: ``[n]`` int32, pages to read, in any order and as often as wanted.
        key_cache: ``[cache_pages, cache_page_tokens, num_kv_heads, head_dim]``, bf16, fp16 or fp32, last
            dimension contiguous.
        value_cache: The same shape and dtype; its strides are its own.
        slot_mapping: ``[n * page_tokens]`` int64, where every token of these pages goes, cache
            page * cache_page_tokens + offset, different for every token, or -1 to skip it.
        layout: Page geometry and codec; page_tokens a power of two up to 128.
        key_balance: ``[num_kv_heads, head_dim]`` float32, by which keys that are not left rotated are
            multiplied.
        rotated: Leave keys, centre included, and values in the rotated domain, and keys balanced.

    Raises:
        ValueError: An argument of another shape, dtype or device, or a size that kernels do not serve.
    """
    check_pages(pages, layout)
    device = pages.device
    check_tensor("page_indices", page_indices, (None,), (torch.int32,), device)
    count = page_indices.shape[0]
    cache_shape = (None, None, layout.num_kv_heads, layout.head_dim)
    check_tensor("key_cache", key_cache, cache_shape, FLOATS, device)
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), (key_cache.dtype,), device)
    check_tensor("slot_mapping", slot_mapping, (count * layout.page_tokens,), (torch.int64,), device)
    if key_balance is not None:
        balance_shape = (layout.num_kv_heads, layout.head_dim)
        check_tensor("key_balance", key_balance, balance_shape, (torch.float32,), device, contiguous_dims=2)
    shape = page_shape(layout)
    if not count:
        return
    if not takes_kernel(device):
        reference_slots.dequantize_pages(
            pages,
            page_indices,
            key_cache,
            value_cache,
            slot_mapping,
            layout,
            key_balance=key_balance,
            rotated=rotated,
        )
        return
    from tq_kernels._launch_dequantize import launch_dequantize  # Triton is imported where it is used

    plan = plan_dequantize(count, shape, rotated=rotated)
    launch_dequantize(
        plan,
        pages,
        page_indices,
        key_cache,
        value_cache,
        slot_mapping,
        layout,
        key_balance=key_balance,
        rotated=rotated,
    )
