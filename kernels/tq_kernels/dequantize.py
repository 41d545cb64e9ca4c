"""Dequantize: packed pages back to rows of an engine's paged cache, in one launch.

A key is Rᵀ (c + scale L) and a value Rᵀ (scale L), with R the rotation, c the centre of the page and L the
levels; or, for readers that work in the rotated domain, the same without Rᵀ, which is no matrix product and
runs at the speed of memory. `kernels/README.md` derives it; `reference_slots.py` is the same in PyTorch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tq_kernels import reference_slots
from tq_kernels._compiled import launch
from tq_kernels._dispatch import has_nvidia_assembly, is_interpreted, takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import PageShape, page_shape
from tq_kernels.layout import PageLayout
from tq_kernels.reference import rotation_of

_PAGES_OF_A_PRODUCT = 4
"""Pages that a program rotates back, so that it reads the rotation once for several pages."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How a launch cuts its pages up.

    Args:
        variant: ``"copy"`` where nothing is rotated back, ``"product"`` where a matrix product does it.
        programs: Programs a KV head and side.
        pages: Pages a program works on, one after the other.
        num_warps: Warps a program.
    """

    variant: str
    programs: int
    pages: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class Mode:
    """Compile-time facts of a launch; cache_tokens is 0 for a cache of one page, whatever its size."""

    pages: int
    cache_tokens: int
    rotate_keys: bool
    rotate_values: bool
    balanced: bool
    ptx: bool


def plan_dequantize(num_pages: int, shape: PageShape, *, rotated: bool) -> LaunchPlan:
    """The plan for a number of pages; it depends on nothing else that a launch brings."""
    num_warps = 8 if shape.page_tokens * shape.tile_dim > 8192 else 4
    if rotated or not (shape.key_rotated or shape.value_rotated):
        return LaunchPlan("copy", num_pages, 1, num_warps)
    pages = _PAGES_OF_A_PRODUCT
    return LaunchPlan("product", -(-num_pages // pages), pages, num_warps)


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
    plan = plan_dequantize(count, shape, rotated=rotated)
    _launch(plan, pages, page_indices, key_cache, value_cache, slot_mapping, layout, key_balance, rotated)


def _launch(
    plan: LaunchPlan,
    pages: torch.Tensor,
    page_indices: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    key_balance: torch.Tensor | None,
    rotated: bool,
) -> None:
    from tq_kernels.device.dequantize import dequantize_sides

    shape = page_shape(layout)
    mode = Mode(
        pages=plan.pages,
        cache_tokens=key_cache.shape[1] if key_cache.shape[0] > 1 else 0,
        rotate_keys=shape.key_rotated and not rotated,
        rotate_values=shape.value_rotated and not rotated,
        balanced=key_balance is not None and not rotated,
        ptx=has_nvidia_assembly(pages.device),
    )
    launch(
        dequantize_sides,
        (plan.programs * layout.num_kv_heads, 2),
        p_pages=pages,
        p_indices=page_indices,
        p_key_cache=key_cache,
        p_value_cache=value_cache,
        p_slots=slot_mapping,
        p_balance=key_balance,
        p_key_rotation=_rotation_tile(layout, pages.device, shape.key_groups) if mode.rotate_keys else None,
        p_value_rotation=_rotation_tile(layout, pages.device, 1) if mode.rotate_values else None,
        num_pages=page_indices.shape[0],
        num_heads=layout.num_kv_heads,
        page_stride=pages.stride(0),
        key_page_stride=key_cache.stride(0),
        key_token_stride=key_cache.stride(1),
        key_head_stride=key_cache.stride(2),
        value_page_stride=value_cache.stride(0),
        value_token_stride=value_cache.stride(1),
        value_head_stride=value_cache.stride(2),
        SHAPE=shape,
        MODE=mode,
        num_warps=plan.num_warps,
        num_stages=1,
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rotation_tile(layout: PageLayout, device: torch.device, groups: int) -> torch.Tensor:
    """The integer matrix d R, ``[tile_dim, tile_dim]``, rows in the order (channel of a group, group).

    Rows and columns beyond head_dim are zero. float16 has its integers exactly.
    """
    tile_dim, head_dim = page_shape(layout).tile_dim, layout.head_dim
    row = torch.arange(head_dim)
    channel = row % groups * (head_dim // groups) + row // groups
    tile = torch.zeros(tile_dim, tile_dim)
    tile[:head_dim, :head_dim] = (rotation_of(layout, torch.device("cpu")) * head_dim).round()[channel]
    return tile.to(device, torch.float32 if is_interpreted() else torch.float16)
