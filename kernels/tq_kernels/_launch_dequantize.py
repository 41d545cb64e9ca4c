"""The launch of the dequantize kernel, and the constants it reads."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tq_kernels._dispatch import has_nvidia_assembly, is_interpreted
from tq_kernels._page_shape import page_shape
from tq_kernels.compiled import launch
from tq_kernels.dequantize_plan import LaunchPlan
from tq_kernels.device.dequantize import dequantize_sides
from tq_kernels.device.rotate_back import matrix_unit
from tq_kernels.layout import PageLayout
from tq_kernels.reference import rotation_of


@dataclass(frozen=True, slots=True)
class Mode:
    """Compile-time facts of a launch; cache_tokens is 0 for a cache of one page, whatever its size."""

    pages: int
    rows: int
    cache_tokens: int
    rotate_keys: bool
    rotate_values: bool
    balanced: bool
    ptx: bool


def launch_dequantize(
    plan: LaunchPlan,
    pages: torch.Tensor,
    page_indices: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None,
    rotated: bool,
    layers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write the tokens of pages into the caches of one layer, or of several.

    Args as in `dequantize.dequantize_pages`, but for:
        layers: ``[num_layers]`` int64 elements from `key_cache` and from `value_cache`, which are the first
            layer's, to those of each; pages and balance then have a dimension of layers before all others.
    """
    shape = page_shape(layout)
    mode = Mode(
        pages=plan.pages,
        rows=plan.rows,
        cache_tokens=key_cache.shape[1] if key_cache.shape[0] > 1 else 0,
        rotate_keys=shape.key_rotated and not rotated,
        rotate_values=shape.value_rotated and not rotated,
        balanced=key_balance is not None and not rotated,
        ptx=has_nvidia_assembly(pages.device),
    )
    launch(
        dequantize_sides,
        (plan.programs * layout.num_kv_heads, 2, 1 if layers is None else len(layers[0])),
        p_pages=pages,
        p_indices=page_indices,
        p_key_cache=key_cache,
        p_value_cache=value_cache,
        p_key_layers=None if layers is None else layers[0],
        p_value_layers=None if layers is None else layers[1],
        p_slots=slot_mapping,
        p_balance=key_balance,
        p_key_rotation=_rotation_tile(layout, pages.device, keys=True) if mode.rotate_keys else None,
        p_value_rotation=_rotation_tile(layout, pages.device, keys=False) if mode.rotate_values else None,
        num_pages=page_indices.shape[0],
        num_heads=layout.num_kv_heads,
        page_layer_stride=0 if layers is None else pages.stride(0),
        page_stride=pages.stride(-2),
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
        **({"maxnreg": plan.max_registers} if mode.ptx else {}),
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rotation_tile(layout: PageLayout, device: torch.device, *, keys: bool) -> torch.Tensor:
    """The integer matrix d R, ``[tile_dim, tile_dim]``, in the order in which threads hold operands and sums.

    Rows of values are channels; those of keys are in the order (channel of a group, group) before
    `_fragment_columns`, and it is divided by `matrix_unit`. Rows and columns beyond head_dim are zero.
    float16 has its numbers exactly.
    """
    shape = page_shape(layout)
    tile_dim, head_dim = shape.tile_dim, layout.head_dim
    channel, row = torch.arange(head_dim), torch.arange(tile_dim)
    column = row.view(-1, 4, 4, 2).transpose(1, 2).flatten()
    if keys:
        groups = shape.key_groups
        channel = channel % groups * (head_dim // groups) + channel // groups
        row = row.view(4, -1, 2).transpose(0, 1).flatten()
    tile = torch.zeros(tile_dim, tile_dim)
    tile[:head_dim, :head_dim] = (rotation_of(layout, torch.device("cpu")) * head_dim).round()[channel]
    tile = tile[row][:, column] / (matrix_unit(head_dim) if keys else 1.0)
    return tile.to(device, torch.float32 if is_interpreted() else torch.float16)
