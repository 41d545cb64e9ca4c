"""Plain float32 PyTorch for quantize and dequantize: the truth that kernels are tested against.

A key k becomes y = R k, less the centre c of its page: z = y - c. With the code's levels L and target t,
index_j = level nearest to z_j * t * sqrt(d) / (s |z|), where s is that of the cell sizes in `cells` whose
levels s L[index] are nearest, and scale = |z| / |L[index]|, so that the reconstruction
R^T (c + scale * L[index]) keeps the length of z ("norm-corrected"). Values likewise, without a centre, and
with a slightly larger scale where `codebook.VALUE_GAINS` says so.
"""

from functools import lru_cache

import torch

from tq_kernels import cells
from tq_kernels._guards import check_page_bytes, check_tokens
from tq_kernels.codebook import GAIN_LIKENESS, LEVELS, TARGETS, VALUE_GAINS, midpoints
from tq_kernels.layout import PageLayout
from tq_kernels.packing import pack, unpack
from tq_kernels.rotation import rotation_matrix
from tq_kernels.spec import Code, KeyCenter

_ITEM_DTYPES = {2: torch.int16, 4: torch.int32}
E4M3_MAX = 448.0
FP16_MAX = 65504.0
SMALLEST_NORM = 1e-30
"""Vectors shorter than this count as zeros; its reciprocal must be far from infinity."""


def quantize(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
    search: bool = True,
) -> torch.Tensor:
    """Whole pages from keys and values.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, floating point; num_tokens a multiple of page_tokens.
        values: The same shape.
        layout: Page geometry and codec.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys are divided before anything else.
        search: Try all cell sizes of `cells.SIZES` on every vector, and `codebook.VALUE_GAINS`, as kernels
            do in launches of many tokens; False for the nearest levels, which theory speaks of.

    Returns:
        Pages ``[num_tokens / page_tokens, page_bytes]`` uint8, padding zero.

    Raises:
        ValueError: A shape that does not fit the layout.
    """
    check_tokens(keys, values, layout)
    num_pages = keys.shape[0] // layout.page_tokens
    pages = torch.zeros(num_pages, layout.page_bytes, dtype=torch.uint8, device=keys.device)
    key, value, center = _rotated_sides(keys, values, layout, key_balance)
    if center is not None:
        plane_view(pages, layout, "key_center")[..., 0, :] = center.view(torch.int16)
    _write_side(pages, layout, "key", *nearest_indices(key, layout.spec.key, search=search))
    gain = value_gain(layout.spec.value, search=search)
    _write_side(pages, layout, "value", *nearest_indices(value, layout.spec.value, search=search, gain=gain))
    return pages


def dequantize(
    pages: torch.Tensor,
    layout: PageLayout,
    dtype: torch.dtype = torch.float32,
    *,
    key_balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that pages stand for.

    Args:
        pages: ``[num_pages, page_bytes]`` uint8.
        layout: Page geometry and codec, the same as when they were made.
        dtype: Of the result.
        key_balance: The balance with which the pages were made, by which keys are multiplied.

    Returns:
        Keys and values, each ``[num_pages * page_tokens, num_kv_heads, head_dim]``.

    Raises:
        ValueError: Pages of another size or dtype.
    """
    key, value = (read_side(pages, layout, side) for side in ("key", "value"))
    return _rotated_back(key, value, read_key_center(pages, layout), layout, dtype, key_balance)


def roundtrip(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dequantize` reads of the pages that `quantize` makes, in a tenth of the operations: no bytes.

    Args:
        keys: As for `quantize`.
        values: As for `quantize`.
        layout: Page geometry and codec.
        key_balance: As for `quantize`.

    Returns:
        Keys and values, float32, of the shape that came.

    Raises:
        ValueError: A shape that does not fit the layout.
    """
    check_tokens(keys, values, layout)
    key, value, center = _rotated_sides(keys, values, layout, key_balance)
    sides = []
    gain = value_gain(layout.spec.value)
    for vectors, code, more in ((key, layout.spec.key, 1.0), (value, layout.spec.value, gain)):
        indices, scales = nearest_indices(vectors, code, gain=more)
        sides.append((_levels_of(indices, code), None if scales is None else scales.float()))
    stored = None if center is None else center.float()
    return _rotated_back(sides[0], sides[1], stored, layout, torch.float32, key_balance)


def read_side(pages: torch.Tensor, layout: PageLayout, side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Levels and scales of ``"key"`` or ``"value"``, still rotated and centred.

    Returns:
        Levels ``[num_pages, num_kv_heads, page_tokens, head_dim]`` float32, and scales
        ``[num_pages, num_kv_heads, page_tokens]`` float32, or None for a code without scales.
    """
    code = layout.spec.key if side == "key" else layout.spec.value
    words, signs = plane_view(pages, layout, f"{side}_words"), None
    if layout.plane(f"{side}_signs"):
        signs = plane_view(pages, layout, f"{side}_signs")
    if side == "value":
        words, signs = words.transpose(-1, -2), None if signs is None else signs.transpose(-1, -2)
    levels = _levels_of(unpack(words, signs, code), code)
    if side == "value":
        levels = levels.transpose(-1, -2)
    if not code.rotated:
        return levels, None
    return levels, plane_view(pages, layout, f"{side}_scales")[..., 0, :].view(torch.float16).float()


def read_key_center(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor | None:
    """Rotated key centres ``[num_pages, num_kv_heads, head_dim]`` float32, or None where there are none."""
    if layout.spec.key_center is KeyCenter.NONE:
        return None
    return plane_view(pages, layout, "key_center")[..., 0, :].view(torch.float16).float()


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def rotation_of(layout: PageLayout, device: torch.device) -> torch.Tensor:
    """The rotation ``[head_dim, head_dim]`` float32 that the layout's codec applies."""
    return rotation_matrix(layout.head_dim, layout.spec.rotation_seed).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def level_table(code: Code, device: torch.device) -> torch.Tensor:
    """Value of every index: float32, ``[2**bits]``."""
    if code is Code.BF16:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
        return bits.view(torch.bfloat16).float().to(device)
    if code.bits == 8:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
    positive = torch.tensor(LEVELS[code], dtype=torch.float32)
    return torch.cat((positive, -positive)).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _edges(code: Code, device: torch.device) -> torch.Tensor:
    """Boundaries between neighbouring levels; a size on one takes the upper level."""
    return torch.tensor(midpoints(LEVELS[code]), dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _cells(code: Code, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes ``[3, steps]`` and differences of squared errors ``[2, steps]`` of `cells`, int32."""
    magnitudes = torch.tensor(cells.magnitudes(code), dtype=torch.int32, device=device)
    return magnitudes, torch.tensor(cells.differences(code), dtype=torch.int32, device=device)


def _levels_of(indices: torch.Tensor, code: Code) -> torch.Tensor:
    return level_table(code, indices.device).index_select(0, indices.flatten()).view(indices.shape)


def value_gain(code: Code, *, search: bool = True) -> float:
    """The gain of values for `nearest_indices`."""
    return VALUE_GAINS.get(code, 1.0) if search else 1.0


def likeness_without_gain(code: Code, head_dim: int) -> float:
    """What `_likeness` is from `GAIN_LIKENESS` on."""
    step = cells.RANGES[code] / (cells.NUM_STEPS - 1)
    return (2 * TARGETS[code] / step) ** 2 * head_dim * GAIN_LIKENESS


def nearest_indices(
    vectors: torch.Tensor, code: Code, *, search: bool = True, gain: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices of ``[..., head_dim]`` float32, and norm-corrected fp16 scales ``[...]`` or None.

    Args:
        vectors: Rotated, and less their centre.
        code: Which indices.
        search: Try all cell sizes of `cells.SIZES` on every vector; False for the nearest levels.
        gain: Factor on the scales of vectors that are less like their levels than `codebook.GAIN_LIKENESS`;
            another than 1 needs the search.
    """
    if code is Code.BF16:
        return vectors.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF, None
    if code is Code.E4M3:
        return _e4m3(vectors), None
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    wanted = TARGETS[code] * vectors.shape[-1] ** 0.5
    likeness = None
    if code is Code.E4M3_SCALED:
        indices = _e4m3(vectors * (wanted / norm.clamp_min(SMALLEST_NORM)))
    else:
        if search:
            steps = _steps(vectors, 1.0 / norm.clamp_min(SMALLEST_NORM) * (wanted / cells.RANGES[code]))
            magnitude = _best_of_sizes(steps, code)
            likeness = _likeness(steps, magnitude, code) if gain != 1 else None
        else:
            size = vectors.abs() * (wanted / norm.clamp_min(SMALLEST_NORM))
            magnitude = torch.bucketize(size, _edges(code, size.device), right=True, out_int32=True)
        indices = magnitude | (torch.signbit(vectors).to(torch.int32) << (code.bits - 1))
    levels = _levels_of(indices, code)
    length = torch.linalg.vector_norm(levels, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    scales = norm / length
    if likeness is not None:
        limit = likeness_without_gain(code, vectors.shape[-1])
        scales = torch.where(likeness < limit, scales * gain, scales)
    scales = scales.clamp_max(FP16_MAX)
    return indices, scales.squeeze(-1).to(torch.float16)


def _steps(vectors: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Step of every size, factor being that which brings the end of their range to one: int64."""
    size = (vectors.abs() * factor).nan_to_num(nan=0.0).clamp_max(1.0)
    return (size.double() * (cells.NUM_STEPS - 1)).long()


def _best_of_sizes(steps: torch.Tensor, code: Code) -> torch.Tensor:
    """Magnitudes at the cell size of least error, int32; of equals the first."""
    magnitudes, differences = _cells(code, steps.device)
    near, far = (each[steps].sum(dim=-1, keepdim=True) for each in differences)
    size = torch.where(far < near.clamp_max(0), 2, torch.where(near < 0, 1, 0))
    return magnitudes.flatten()[size * cells.NUM_STEPS + steps]


def _likeness(steps: torch.Tensor, magnitude: torch.Tensor, code: Code) -> torch.Tensor:
    """Grows with the cosine between vectors and their levels; ``[..., 1]`` float32.

    From whole numbers, so that every machine chooses alike: sizes in half steps, levels in quarters.
    """
    levels = (_levels_of(magnitude, code) * 4).to(torch.int32)
    product = (levels * (2 * steps + 1)).sum(dim=-1, keepdim=True, dtype=torch.int32).float()
    return product * product / levels.square().sum(dim=-1, keepdim=True, dtype=torch.int32).float()


def _e4m3(vectors: torch.Tensor) -> torch.Tensor:
    """Bytes of the saturating e4m3 cast, as int32."""
    cast = vectors.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return cast.view(torch.uint8).to(torch.int32)


def _rotated_sides(
    keys: torch.Tensor, values: torch.Tensor, layout: PageLayout, key_balance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What is written of keys and of values, ``[num_pages, heads, page_tokens, dim]``, and fp16 centres."""
    key, value = (_by_page(tensor, layout) for tensor in (keys, values))
    center = None
    if key_balance is not None:
        key = key / key_balance[:, None, :]
    if layout.spec.key.rotated:
        key = key @ rotation_of(layout, keys.device).T
    if layout.spec.key_center is KeyCenter.PAGE:
        center = key.mean(dim=2).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
        key = key - center.float()[:, :, None]
    if layout.spec.value.rotated:
        value = value @ rotation_of(layout, keys.device).T
    return key, value, center


def _rotated_back(
    key: tuple[torch.Tensor, torch.Tensor | None],
    value: tuple[torch.Tensor, torch.Tensor | None],
    center: torch.Tensor | None,
    layout: PageLayout,
    dtype: torch.dtype,
    key_balance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values by token from levels and scales by page, and float32 centres of keys."""
    sides: list[torch.Tensor] = []
    for (vectors, scales), code in ((key, layout.spec.key), (value, layout.spec.value)):
        if scales is not None:
            vectors = vectors * scales[..., None]
        if center is not None and not sides:
            vectors = vectors + center[:, :, None]
        if code.rotated:
            vectors = vectors @ rotation_of(layout, vectors.device)
        if key_balance is not None and not sides:
            vectors = vectors * key_balance[:, None, :]
        sides.append(vectors.transpose(1, 2).flatten(0, 1).to(dtype))
    return sides[0], sides[1]


def _write_side(
    pages: torch.Tensor, layout: PageLayout, side: str, indices: torch.Tensor, scales: torch.Tensor | None
) -> None:
    code = layout.spec.key if side == "key" else layout.spec.value
    if side == "value":
        indices = indices.transpose(-1, -2)
    words, signs = pack(indices, code)
    if side == "value":
        words, signs = words.transpose(-1, -2), None if signs is None else signs.transpose(-1, -2)
    plane_view(pages, layout, f"{side}_words").copy_(words)
    if signs is not None:
        plane_view(pages, layout, f"{side}_signs").copy_(signs)
    if scales is not None:
        plane_view(pages, layout, f"{side}_scales")[..., 0, :] = scales.view(torch.int16)


def plane_view(pages: torch.Tensor, layout: PageLayout, name: str) -> torch.Tensor:
    """A plane of all pages and heads, in place: ``[num_pages, num_kv_heads, rows, columns]``."""
    plane = layout.plane(name)
    if plane is None:
        raise KeyError(name)
    check_page_bytes(pages, layout)
    sections = pages.view(-1, layout.num_kv_heads, layout.section_bytes)
    raw = sections[..., plane.offset : plane.offset + plane.num_bytes]
    return raw.view(_ITEM_DTYPES[plane.item_bytes]).view(*raw.shape[:-1], plane.rows, plane.columns)


def _by_page(tensor: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """``[num_tokens, heads, dim]`` as float32 ``[num_pages, heads, page_tokens, dim]``."""
    return tensor.float().reshape(-1, layout.page_tokens, *tensor.shape[1:]).transpose(1, 2)
