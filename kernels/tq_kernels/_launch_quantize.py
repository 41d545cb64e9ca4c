"""The launch of the quantize kernel, and the constants it reads."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tq_kernels._cell_words import cell_words
from tq_kernels._dispatch import has_nvidia_assembly, is_interpreted
from tq_kernels._page_shape import page_shape
from tq_kernels.compiled import launch
from tq_kernels.device.quantize import quantize_runs
from tq_kernels.layout import PageLayout
from tq_kernels.quantize_plan import LaunchPlan
from tq_kernels.reference import rotation_of
from tq_kernels.spec import Rotation


@dataclass(frozen=True, slots=True)
class Mode:
    """Compile-time facts of a launch.

    Parts are those in which a float32 vector meets the rotation; cache_tokens are those of a page of the
    cache that vectors are read from, 0 where they lie one after the other.
    """

    rows: int
    window: int
    windows: int
    seeded: bool
    balanced: bool
    search: bool
    cache_tokens: int
    key_parts: int
    value_parts: int
    ptx: bool


def launch_quantize(
    plan: LaunchPlan,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor | None,
    key_balance: torch.Tensor | None,
    sinks: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    layers: tuple[torch.Tensor, torch.Tensor] | None = None,
    source_slots: torch.Tensor | None = None,
) -> None:
    """Write tokens of one layer or, out of their caches, of several.

    Args as in `quantize.quantize_slots`, but for:
        layers: ``[num_layers]`` int64 elements from `keys` and from `values`, which are the caches of the
            first layer, to those of each; pages and balance then have a first dimension of layers.
        source_slots: ``[num_tokens]`` int64 of tokens in the caches; comes with `layers`.
    """
    in_cache = layers is not None
    balanced = key_balance is not None
    rotation_dtype = _parts(keys.dtype, balanced)[2]
    fixed = _constants(
        layout,
        keys.dtype,
        (plan.rows, plan.window, plan.windows, plan.search, plan.num_warps, plan.max_registers),
        seed_pages is not None,
        balanced,
        keys.shape[1] if in_cache else 0,
        has_nvidia_assembly(pages.device),
    )
    sink_slots, sink_keys, sink_values = sinks
    key_strides, value_strides = keys.stride(), values.stride()
    sink_strides = (0, 0) if sink_keys is None else sink_keys.stride()
    launch(
        quantize_runs,
        (layout.num_kv_heads, plan.programs, 1 if layers is None else len(layers[0])),
        fixed,
        p_keys=keys,
        p_values=values,
        p_slots=slot_mapping,
        p_sources=slot_mapping if source_slots is None else source_slots,
        p_key_layers=None if layers is None else layers[0],
        p_value_layers=None if layers is None else layers[1],
        p_seeds=seed_pages,
        p_balance=key_balance,
        p_rotation=_rotation_tile(layout, pages.device, rotation_dtype),
        p_cells=cell_words(layout, pages.device) if plan.search else None,
        p_pages=pages,
        p_sink_slots=sink_slots,
        p_sink_keys=sink_keys,
        p_sink_values=sink_values,
        num_tokens=slot_mapping.shape[0],
        key_page_stride=key_strides[0] if in_cache else 0,
        key_token_stride=key_strides[-3],
        key_head_stride=key_strides[-2],
        value_page_stride=value_strides[0] if in_cache else 0,
        value_token_stride=value_strides[-3],
        value_head_stride=value_strides[-2],
        page_layer_stride=pages.stride(0) if in_cache else 0,
        page_stride=pages.stride(-2),
        sink_token_stride=sink_strides[0],
        sink_head_stride=sink_strides[1],
    )


@lru_cache(maxsize=64)
def _constants(
    layout: PageLayout,
    dtype: torch.dtype,
    cut: tuple[int, int, int, bool, int, int | None],
    seeded: bool,
    balanced: bool,
    cache_tokens: int,
    ptx: bool,
) -> dict[str, Any]:
    """Constants and options for what a plan says of a program; the same object for the same call."""
    rows, window, windows, search, num_warps, max_registers = cut
    key_parts, value_parts, _ = _parts(dtype, balanced)
    mode = Mode(
        rows=rows,
        window=window,
        windows=windows,
        seeded=seeded,
        balanced=balanced,
        search=search,
        cache_tokens=cache_tokens,
        key_parts=key_parts,
        value_parts=value_parts,
        ptx=ptx,
    )
    options = {"num_warps": num_warps, "num_stages": 1} | ({"maxnreg": max_registers} if ptx else {})
    return {"SHAPE": page_shape(layout), "MODE": mode, **options}


@lru_cache(maxsize=16)
def _parts(dtype: torch.dtype, balanced: bool) -> tuple[int, int, torch.dtype]:
    """Parts of keys, parts of values, and the dtype of the parts and the rotation.

    A bfloat16 holds 8 bits and the range of float32: 3 parts are a float32, 2 are a float16 or a quotient of
    half-precision numbers within 2^-17.
    """
    if is_interpreted():
        return 0, 0, torch.float32
    if dtype is torch.float32:
        return 3, 3, torch.bfloat16
    if balanced:
        return 2, 1 if dtype is torch.bfloat16 else 2, torch.bfloat16
    return 1, 1, dtype


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rotation_tile(layout: PageLayout, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """The integer matrix (d R)^T, ``[tile_dim, tile_dim]``, columns in the order of the kernel's tiles.

    Rows and columns beyond head_dim are zero. Its integers are at most head_dim in size, which bfloat16 holds
    exactly up to 256. None for a codec that does not rotate.
    """
    if layout.spec.rotation is Rotation.NONE:
        return None
    shape = page_shape(layout)
    integers = (rotation_of(layout, torch.device("cpu")) * layout.head_dim).round().T
    column = torch.arange(shape.tile_dim)
    quads = layout.head_dim // (4 * shape.key_groups)
    word = column // 2 % 4 * (shape.tile_dim // (16 * shape.key_groups)) + column // (16 * shape.key_groups)
    quad = column // 16 % shape.key_groups * quads + word
    channel = 4 * quad + column // 8 % 2 * 2 + column % 2
    tile = torch.zeros(shape.tile_dim, shape.tile_dim)
    tile[: layout.head_dim, word < quads] = integers[:, channel[word < quads]]
    return tile.to(device, dtype)
