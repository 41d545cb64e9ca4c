"""Quantize and dequantize on a CPU, tile by tile, many times as fast as `reference`.

`reference` works on whole tensors, so on a CPU it waits for memory. Here a tile of pages stays in the cache:
loops that Numba compiles move its tokens (`host_tokens`), rotate them (`host_rotation`) and turn vectors into
packed words and back (`host_loops`). Sums may differ from the reference's by rounding, and nothing else.
"""

from importlib import import_module
from typing import Any

import torch

from tq_kernels import reference
from tq_kernels._guards import check_tokens
from tq_kernels.cells import RANGES
from tq_kernels.codebook import LEVELS, TARGETS
from tq_kernels.layout import PageLayout
from tq_kernels.reference import (
    E4M3_MAX,
    FP16_MAX,
    SMALLEST_NORM,
    likeness_without_gain,
    plane_view,
    read_key_center,
    rotation_of,
)
from tq_kernels.spec import Code, KeyCenter

_TILE_ELEMENTS = 1 << 18
"""Elements of keys, or of values, that are worked on at once: a megabyte of float32."""
_EXACT_SQUARES = {Code.LM2: 1024, Code.LM3: 512, Code.LM4: 256}
"""Channels up to which float32 holds a sum of squared levels exactly, whatever the order."""


def prepare(layout: PageLayout) -> None:
    """Compile the loops that a layout needs, which takes seconds and is otherwise done by the first calls."""
    pages = torch.empty(1, layout.page_bytes, dtype=torch.uint8)
    shape = (2, layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    apart, alternating = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(*shape[1:], 2).bfloat16()
    for keys, values in (apart, apart.float(), alternating.movedim(-1, 0)):
        quantize(keys, values, layout, pages)
        dequantize(pages, layout, keys, values)


def quantize(keys: torch.Tensor, values: torch.Tensor, layout: PageLayout, pages: torch.Tensor) -> None:
    """Write whole pages: what `reference.quantize` returns.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, floating point, any strides; num_tokens a multiple of
            page_tokens.
        values: The same shape.
        layout: Page geometry and codec.
        pages: ``[num_tokens / page_tokens, page_bytes]`` uint8 on the CPU, overwritten.

    Raises:
        ValueError: A shape that does not fit the layout, or pages of another size or dtype.
    """
    _check(keys, values, layout, pages)
    dense = pages.contiguous()
    dense.numpy().fill(0)
    for tile, tokens in _tiles(dense, layout):
        if not _write_tile(tile, keys[tokens], values[tokens], layout):
            tile.copy_(reference.quantize(keys[tokens], values[tokens], layout))
    if dense is not pages:
        pages.copy_(dense)


def dequantize(pages: torch.Tensor, layout: PageLayout, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys and values that pages stand for, written in place.

    Args:
        pages: ``[num_pages, page_bytes]`` uint8 on the CPU.
        layout: Page geometry and codec, the same as when they were made.
        keys: ``[num_pages * page_tokens, num_kv_heads, head_dim]``, floating point, any strides.
        values: The same shape.

    Raises:
        ValueError: Pages of another size or dtype, or keys and values of another shape.
    """
    _check(keys, values, layout, pages)
    for tile, tokens in _tiles(pages.contiguous(), layout):
        for side, code, out in (("key", layout.spec.key, keys), ("value", layout.spec.value, values)):
            vectors = _read_side(tile, layout, side)
            if code.rotated:
                vectors = _rotated(vectors, layout, inverse=True)
            _store(vectors, out[tokens], layout)


def _check(keys: torch.Tensor, values: torch.Tensor, layout: PageLayout, pages: torch.Tensor) -> None:
    check_tokens(keys, values, layout)
    count = keys.shape[0] // layout.page_tokens
    if pages.dtype != torch.uint8 or tuple(pages.shape) != (count, layout.page_bytes):
        raise ValueError(
            f"pages must be [{count}, {layout.page_bytes}] uint8, not {list(pages.shape)} {pages.dtype}"
        )


def _tiles(pages: torch.Tensor, layout: PageLayout) -> list[tuple[torch.Tensor, slice]]:
    """Runs of pages that fit the cache, each with its tokens."""
    step = max(1, _TILE_ELEMENTS // (layout.page_tokens * layout.num_kv_heads * layout.head_dim))
    return [
        (pages[first : first + step], slice(first * layout.page_tokens, (first + step) * layout.page_tokens))
        for first in range(0, pages.shape[0], step)
    ]


def _write_tile(tile: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: PageLayout) -> bool:
    """Write pages of zeros; False, with anything in them, where sums would not be exact or norms are none."""
    for side, tokens, code in (("key", keys, layout.spec.key), ("value", values, layout.spec.value)):
        if layout.head_dim > _EXACT_SQUARES.get(code, layout.head_dim):
            return False
        vectors = _load(tokens, layout)
        if not code.rotated:
            _write_cast(tile, layout, side, _cast(vectors, code))
            continue
        vectors = _rotated(vectors, layout)
        centers = torch.zeros(*vectors.shape[:2], layout.head_dim)
        if side == "key" and layout.spec.key_center is KeyCenter.PAGE:
            _loops("host_tokens").mean_of_sections(_rows(vectors), layout.page_tokens, _rows(centers))
            stored = centers.clamp_(-FP16_MAX, FP16_MAX).to(torch.float16)
            plane_view(tile, layout, "key_center")[..., 0, :] = stored.view(torch.int16)
            centers = stored.float()
        write = _write_indices if code in LEVELS else _write_scaled
        scales = write(tile, layout, side, vectors, centers)
        if scales is None:
            return False
        plane_view(tile, layout, f"{side}_scales")[..., 0, :] = scales.view(torch.int16)
    return True


def _load(tokens: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """``[tokens, heads, dim]`` as float32 ``[pages, heads, page_tokens, dim]``."""
    loops = _loops("host_tokens")
    shape = (len(tokens) // layout.page_tokens, layout.num_kv_heads, layout.page_tokens, layout.head_dim)
    vectors = torch.empty(shape)
    load = loops.loader(is_bits=tokens.dtype is torch.bfloat16)
    load(loops.as_array(tokens), layout.page_tokens, _rows(vectors))
    return vectors


def _store(vectors: torch.Tensor, tokens: torch.Tensor, layout: PageLayout) -> None:
    """Undo `_load`, in place, rounded to the dtype of the tokens."""
    loops = _loops("host_tokens")
    is_bits = tokens.dtype is torch.bfloat16
    array = loops.as_array(tokens)
    loops.storer(is_bits=is_bits)(array, layout.page_tokens, _rows(vectors))
    if tokens.dtype not in (torch.bfloat16, torch.float32):
        tokens.copy_(torch.from_numpy(array))


def _rotated(vectors: torch.Tensor, layout: PageLayout, *, inverse: bool = False) -> torch.Tensor:
    """Contiguous ``[pages, heads, page_tokens, dim]`` float32, rotated or rotated back; may be in place."""
    loops = _loops("host_rotation")
    if loops.has_butterflies(layout.head_dim):
        rotate = loops.rotator(layout.head_dim, layout.spec.rotation_seed, inverse=inverse)
        rotate(vectors.view(-1).numpy())
        return vectors
    matrix = rotation_of(layout, vectors.device)
    return torch.matmul(vectors, matrix if inverse else matrix.T)


def _write_indices(
    tile: torch.Tensor, layout: PageLayout, side: str, vectors: torch.Tensor, centers: torch.Tensor
) -> torch.Tensor | None:
    """Words and sign words of Lloyd-Max codes.

    Returns:
        Scales ``[pages, heads, tokens]`` float16, or None where a norm is none.
    """
    code = layout.spec.key if side == "key" else layout.spec.value
    scales = torch.empty(vectors.shape[:-1])
    to_range = TARGETS[code] * layout.head_dim**0.5 / RANGES[code]
    limit = likeness_without_gain(code, layout.head_dim)
    write = _loops("host_loops").index_writer(code, is_value=side == "value")
    place = _place(tile, layout, side)
    is_finite = write(_rows(vectors), _rows(centers), scales.view(-1).numpy(), to_range, limit, *place)
    return scales.to(torch.float16) if is_finite else None


def _write_scaled(
    tile: torch.Tensor, layout: PageLayout, side: str, vectors: torch.Tensor, centers: torch.Tensor
) -> torch.Tensor | None:
    """Bytes of e4m3; the rest as in `_write_indices`."""
    code = layout.spec.key if side == "key" else layout.spec.value
    vectors.sub_(centers[:, :, None])
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not bool(norm.isfinite().all()):
        return None
    vectors.mul_(TARGETS[code] * vectors.shape[-1] ** 0.5 / norm.clamp_min(SMALLEST_NORM))
    cast = vectors.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    _write_cast(tile, layout, side, cast)
    length = torch.linalg.vector_norm(cast.float(), dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    scales: torch.Tensor = (norm / length).clamp_max(FP16_MAX).squeeze(-1)
    return scales.to(torch.float16)


def _cast(vectors: torch.Tensor, code: Code) -> torch.Tensor:
    """Numbers of the codes that are a cast."""
    if code is Code.BF16:
        return vectors.to(torch.bfloat16)
    return vectors.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _write_cast(tile: torch.Tensor, layout: PageLayout, side: str, numbers: torch.Tensor) -> None:
    words = _turned(numbers, side).contiguous().view(torch.int32)
    plane_view(tile, layout, f"{side}_words").copy_(_turned(words, side))


def _read_side(tile: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    """Centres and levels times scales ``[pages, heads, tokens, dim]`` float32, still rotated."""
    code = layout.spec.key if side == "key" else layout.spec.value
    if not code.rotated:
        return _read_cast(tile, layout, side)
    scales = plane_view(tile, layout, f"{side}_scales")[..., 0, :].view(torch.float16).float()
    centers = read_key_center(tile, layout) if side == "key" else None
    if centers is None:
        centers = torch.zeros(*scales.shape[:2], layout.head_dim)
    if code not in LEVELS:
        return _read_cast(tile, layout, side).mul_(scales[..., None]).add_(centers[:, :, None])
    vectors = torch.empty(*scales.shape, layout.head_dim)
    read = _loops("host_loops").index_reader(code, is_value=side == "value")
    read(_rows(vectors), scales.view(-1).numpy(), _rows(centers), *_place(tile, layout, side))
    return vectors


def _read_cast(tile: torch.Tensor, layout: PageLayout, side: str) -> torch.Tensor:
    """Numbers of the codes that are a cast, float32."""
    code = layout.spec.key if side == "key" else layout.spec.value
    words = _turned(plane_view(tile, layout, f"{side}_words"), side).contiguous()
    numbers = words.view(torch.bfloat16 if code is Code.BF16 else torch.float8_e4m3fn)
    return _turned(numbers, side).to(torch.float32, memory_format=torch.contiguous_format)


def _turned(part: torch.Tensor, side: str) -> torch.Tensor:
    """Keys are packed along channels, values along tokens."""
    return part.transpose(-1, -2) if side == "value" else part


def _rows(vectors: torch.Tensor) -> Any:
    return vectors.view(-1, vectors.shape[-1]).numpy()


def _place(tile: torch.Tensor, layout: PageLayout, side: str) -> tuple[Any, Any, int, tuple[int, ...]]:
    """What the loops want to know of pages."""
    flat = tile.view(-1)
    words, signs = layout.plane(f"{side}_words"), layout.plane(f"{side}_signs")
    assert words is not None
    in_words = (layout.section_bytes // 4, words.offset // 4)
    in_signs = (layout.section_bytes // 2, 0 if signs is None else signs.offset // 2)
    as_words, as_signs = flat.view(torch.int32).numpy(), flat.view(torch.int16).numpy()
    return as_words, as_signs, layout.page_tokens, (*in_words, *in_signs)


def _loops(name: str) -> Any:
    """A module of loops. Numba takes half a second to import, and whoever has a GPU needs none of it."""
    return import_module(f"tq_kernels.{name}")
