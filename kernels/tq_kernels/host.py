"""Quantize and dequantize on a CPU, tile by tile: the bytes of `reference`, at several times its speed.

`reference` works on whole tensors, so on a CPU it waits for memory. Here a tile of pages stays in the cache,
magnitudes are bytes, and one lookup in a table covers four elements: four magnitudes are a 16-bit word of
nibbles, which is also what the packed words are made of.
"""

from functools import lru_cache

import torch

from tq_kernels._guards import check_tokens
from tq_kernels.codebook import BOUNDARIES, LEVELS, TARGETS
from tq_kernels.layout import PageLayout
from tq_kernels.packing import pack
from tq_kernels.reference import (
    E4M3_MAX,
    FP16_MAX,
    SMALLEST_NORM,
    level_table,
    likeness_without_gain,
    nearest_indices,
    plane_view,
    read_key_center,
    rotation_of,
    value_gain,
)
from tq_kernels.spec import Code, KeyCenter

_TILE_ELEMENTS = 1 << 17
"""Elements of keys, or of values, that are worked on at once: half a megabyte of float32."""
_EXACT_SQUARES = {Code.LM2: 1024, Code.LM3: 512, Code.LM4: 256}
"""Channels up to which float32 holds a sum of squared levels exactly, whatever the order."""


def quantize(keys: torch.Tensor, values: torch.Tensor, layout: PageLayout, pages: torch.Tensor) -> None:
    """Write whole pages, byte for byte what `reference.quantize` returns.

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
    pages.zero_()
    for tile, tokens in _tiles(pages, layout):
        key = _rotated(keys[tokens], layout, layout.spec.key)
        if layout.spec.key_center is KeyCenter.PAGE:
            center = key.mean(dim=2).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
            plane_view(tile, layout, "key_center")[..., 0, :] = center.view(torch.int16)
            key.sub_(center.float()[:, :, None])
        _write_side(tile, layout, "key", key)
        _write_side(tile, layout, "value", _rotated(values[tokens], layout, layout.spec.value))


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
    for tile, tokens in _tiles(pages, layout):
        for side, code, out in (("key", layout.spec.key, keys), ("value", layout.spec.value, values)):
            vectors = _read_side(tile, layout, side, code)
            center = read_key_center(tile, layout) if side == "key" else None
            if center is not None:
                vectors = vectors + center[:, :, None]
            if code.rotated:
                vectors = vectors @ rotation_of(layout, pages.device)
            by_page = out[tokens].unflatten(0, (-1, layout.page_tokens))
            by_page.copy_(vectors.transpose(1, 2))


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


def _rotated(tokens: torch.Tensor, layout: PageLayout, code: Code) -> torch.Tensor:
    """``[tokens, heads, dim]`` as float32 ``[pages, heads, page_tokens, dim]``, rotated where the code is."""
    by_page = tokens.unflatten(0, (-1, layout.page_tokens)).transpose(1, 2)
    vectors = torch.empty(by_page.shape, dtype=torch.float32)
    vectors.copy_(by_page)
    return vectors @ rotation_of(layout, vectors.device).T if code.rotated else vectors


def _write_side(tile: torch.Tensor, layout: PageLayout, side: str, vectors: torch.Tensor) -> None:
    code = layout.spec.key if side == "key" else layout.spec.value
    words, signs, scales = _packed(vectors, code, is_value=side == "value")
    plane_view(tile, layout, f"{side}_words").copy_(words)
    if signs is not None:
        plane_view(tile, layout, f"{side}_signs").copy_(signs)
    if scales is not None:
        plane_view(tile, layout, f"{side}_scales")[..., 0, :] = scales.view(torch.int16)


def _packed(
    vectors: torch.Tensor, code: Code, *, is_value: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Words, sign words and scales of ``[pages, heads, tokens, dim]``; `vectors` is overwritten."""
    if not code.rotated or code is Code.E4M3_SCALED:
        cast, scales = _cast(vectors, code)
        words = (cast.transpose(-1, -2) if is_value else cast).contiguous().view(torch.int32)
        return _turned(words, is_value), None, scales
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    gain = value_gain(code) if is_value else 1.0
    if vectors.shape[-1] > _EXACT_SQUARES[code] or not bool(norm.isfinite().all()):
        indices, scales = nearest_indices(vectors, code, gain=gain)
        words, signs = pack(indices.transpose(-1, -2) if is_value else indices, code)
        return _turned(words, is_value), None if signs is None else _turned(signs, is_value), scales
    vectors.mul_(TARGETS[code] * vectors.shape[-1] ** 0.5 / norm.clamp_min(SMALLEST_NORM))
    negative = (vectors.view(torch.int32) >> 31).to(torch.uint8).bitwise_and_(1)
    magnitude, squares, likeness = _closest(vectors.abs_(), code)
    # float32 sqrt is off by a unit now and then, where vector_norm is not
    scales = norm / squares.double().sqrt().float()
    if gain != 1:
        limit = likeness_without_gain(code, vectors.shape[-1])
        scales = torch.where(likeness < limit, scales * gain, scales)
    scales = scales.clamp_max(FP16_MAX).squeeze(-1).to(torch.float16)
    if is_value:
        magnitude, negative = (part.transpose(-1, -2).contiguous() for part in (magnitude, negative))
    words, signs = _join(magnitude.view(torch.int32), negative.view(torch.int32), code)
    return _turned(words, is_value), None if signs is None else _turned(signs, is_value), scales


def _cast(vectors: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bytes or bfloat16 of the codes that are a cast, and their scales; `vectors` is overwritten."""
    if code is Code.BF16:
        return vectors.to(torch.bfloat16), None
    if code is Code.E4M3:
        return vectors.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), None
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    vectors.mul_(TARGETS[code] * vectors.shape[-1] ** 0.5 / norm.clamp_min(SMALLEST_NORM))
    cast = vectors.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    length = torch.linalg.vector_norm(cast.float(), dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    return cast, (norm / length).clamp_max(FP16_MAX).squeeze(-1).to(torch.float16)


def _turned(part: torch.Tensor, along_tokens: bool) -> torch.Tensor:
    return part.transpose(-1, -2) if along_tokens else part


def _closest(sizes: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Magnitudes as bytes by the best set of boundaries, which `reference.nearest_indices` defines.

    And sums of squared levels and likenesses, each ``[..., 1]`` float32. Overwrites its input.
    """
    halves = (sizes.view(torch.int32) & 0x7FFFE000).view(torch.float32)
    halves = halves.clamp(max=127.5).mul_(2).round_()
    table = _magnitude_table(code)
    eighths = sizes.mul_(8).clamp_(max=len(table) - 1).to(torch.int32)
    of_sets = table.index_select(0, eighths.flatten()).view(sizes.shape)
    best = best_squares = best_likeness = torch.empty(0)
    for i in range(len(BOUNDARIES[code])):
        fours = (of_sets >> (8 * i)).to(torch.uint8).view(torch.int32)
        words = _nibbles(fours).flatten()
        squares = _square_table(code).index_select(0, words).view(fours.shape)
        squares = squares.sum(dim=-1, keepdim=True)
        levels = _levels(words, code).view(sizes.shape)
        product = levels.mul_(halves).sum(dim=-1, keepdim=True)
        likeness = product * product / squares
        if i:
            closer = likeness > best_likeness
            fours = torch.where(closer, fours, best)
            squares = torch.where(closer, squares, best_squares)
            likeness = torch.where(closer, likeness, best_likeness)
        best, best_squares, best_likeness = fours, squares, likeness
    return best.view(torch.uint8), best_squares, best_likeness


def _nibbles(fours: torch.Tensor) -> torch.Tensor:
    """The low nibbles of four bytes, next to each other in the low half of an int32."""
    pairs = (fours | (fours >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def _join(
    magnitudes: torch.Tensor, signs: torch.Tensor, code: Code
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Words of `layout.WORD_FORMATS` from int32 tensors that hold four elements a word, one a byte."""
    groups = {Code.LM4: 2, Code.LM3: 4, Code.LM2: 4}[code]
    magnitude, sign = (part.chunk(groups, dim=-1) for part in (magnitudes, signs))
    if code is Code.LM4:
        words = _nibbles(magnitude[0]) | (_nibbles(magnitude[1]) << 16)
        return words | (sign[0] << 7) | (sign[1] << 3), None
    if code is Code.LM2:
        parts = [(magnitude[g] << g) | (sign[g] << (7 - g)) for g in range(4)]
        return parts[0] | parts[1] | parts[2] | parts[3], None
    low, high = (_nibbles(magnitude[g]) | (_nibbles(magnitude[g + 1]) << 2) for g in (0, 2))
    flags = [_lm3_signs(sign[g]) << (3 - g) for g in range(4)]
    return low | (high << 16), (flags[0] | flags[1] | flags[2] | flags[3]).to(torch.int16)


def _lm3_signs(fours: torch.Tensor) -> torch.Tensor:
    """Signs of lanes 0 to 3 at bits 4, 12, 0 and 8: where the last group has them."""
    return ((fours & 1) << 4) | ((fours & 0x100) << 4) | ((fours >> 16) & 1) | ((fours >> 16) & 0x100)


def _read_side(tile: torch.Tensor, layout: PageLayout, side: str, code: Code) -> torch.Tensor:
    """Levels times scales ``[pages, heads, tokens, dim]`` float32, still rotated and centred."""
    along_tokens = side == "value"
    words, signs = plane_view(tile, layout, f"{side}_words"), None
    if layout.plane(f"{side}_signs"):
        signs = _turned(plane_view(tile, layout, f"{side}_signs"), along_tokens).to(torch.int32)
    words = _turned(words, along_tokens)
    if code in _EXACT_SQUARES:
        fours = torch.cat(_split(words, signs, code), dim=-1)
        levels = _levels(fours.flatten(), code).view(*fours.shape[:-1], -1)
    else:
        cast = torch.bfloat16 if code is Code.BF16 else torch.float8_e4m3fn
        levels = words.contiguous().view(cast).float()
    if code.rotated:
        scales = plane_view(tile, layout, f"{side}_scales").view(torch.float16).float()
        levels.mul_(scales if along_tokens else scales.transpose(-1, -2))
    return _turned(levels, along_tokens)


def _split(words: torch.Tensor, signs: torch.Tensor | None, code: Code) -> list[torch.Tensor]:
    """Indices of each group of a packed axis, four of them in the low half of an int32."""
    ones = 0x01010101
    if code is Code.LM4:
        first = (words & 0x7777) | (_nibbles((words >> 7) & ones) << 3)
        return [first, ((words >> 16) & 0x7777) | (_nibbles((words >> 3) & ones) << 3)]
    if code is Code.LM2:
        return [_nibbles(((words >> g) & ones) | (((words >> (7 - g)) & ones) << 1)) for g in range(4)]
    assert signs is not None
    groups = []
    for g, shift in enumerate((0, 2, 16, 18)):
        flags = signs >> (3 - g)
        low, high = ((flags >> 2) & 0x4) | ((flags >> 6) & 0x40), ((flags & 1) << 10) | ((flags & 0x100) << 6)
        groups.append(((words >> shift) & 0x3333) | low | high)
    return groups


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def _magnitude_table(code: Code) -> torch.Tensor:
    """Magnitudes by whole eighths, which decide as boundaries are such; the last entry is of all above too.

    A magnitude is how many boundaries do not lie above; each set of them has a byte of an int32.
    """
    edges = [torch.tensor([int(8 * boundary) for boundary in each]) for each in BOUNDARIES[code]]
    eighths = torch.arange(1 + max(int(each[-1]) for each in edges))
    counts = [torch.bucketize(eighths, each, right=True) << (8 * i) for i, each in enumerate(edges)]
    return torch.stack(counts).sum(dim=0).to(torch.int32)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _square_table(code: Code) -> torch.Tensor:
    """Sum of the squared levels of four magnitudes, by their 16-bit word of nibbles: float32."""
    squares = torch.zeros(8)
    squares[: len(LEVELS[code])] = torch.tensor(LEVELS[code]).square()
    words = torch.arange(1 << 15)
    return torch.stack([squares[(words >> shift) & 7] for shift in (0, 4, 8, 12)]).sum(dim=0)


def _levels(words: torch.Tensor, code: Code) -> torch.Tensor:
    """Levels of ``[n]`` 16-bit words of nibbles, four of each: ``[4 n]`` float32."""
    return _level_table(code).index_select(0, words).view(torch.float32)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _level_table(code: Code) -> torch.Tensor:
    """Levels of four indices, by their 16-bit word of nibbles: ``[65536]`` complex128, each of four float32.

    PyTorch gathers numbers three times as fast as rows.
    """
    levels = level_table(code, torch.device("cpu"))
    words = torch.arange(1 << 16)
    mask = levels.shape[0] - 1
    rows = torch.stack([levels[(words >> shift) & mask] for shift in (0, 4, 8, 12)], dim=-1)
    return rows.view(torch.complex128).flatten()
