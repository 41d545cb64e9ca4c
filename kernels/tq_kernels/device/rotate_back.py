"""Device functions that write tokens of a page to rows of a cache, rotated back.

Float16 numbers meet the integers of d R on the tensor cores. Of values they are levels, which are exact;
scales and d come after. Keys have a centre, so theirs are levels times scales plus centre: rounded once for
caches in half precision, in two parts for others.
"""

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS
from tq_kernels.device.levels import group_levels
from tq_kernels.device.write_rows import interleaved, key_words, rounded, rows, value_words

_KEY_UNIT = tl.constexpr(16.0)
"""Rotated keys are divided by it, so that a key as large as float16 allows does not overflow when rotated."""
_REST_UNIT = tl.constexpr(2048.0)
"""What float16 leaves of a key is multiplied by it, or small keys would leave subnormals of few bits."""


@triton.constexpr_function
def columns_of_part(tile_dim):
    """Columns of a product: as few as leave registers for a second program on a multiprocessor."""
    return min(tile_dim, 64) if tile_dim <= 128 else 128


@triton.constexpr_function
def largest_scale(code):
    """Where scales of keys end, so that levels times them plus a centre are finite in float16."""
    return (_KEY_UNIT.value - 1) * 65504.0 / max(LEVELS[code])


@triton.jit
def _finite(x):
    """Numbers of float16; NaNs stay."""
    x = tl.where(x > 65504.0, 65504.0, x)
    return tl.where(x < -65504.0, -65504.0, x)


@triton.jit
def _beside(x, y):
    """Columns of two tiles by turns."""
    return tl.reshape(tl.join(x, y), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def _product(x, b_rotation):
    """float16 times d R: exact products, float32 sums."""
    return tl.dot(x.to(b_rotation.dtype), b_rotation, input_precision="ieee")


@triton.jit
def rotate_keys(
    p_section,
    p_cache,
    p_slots,
    p_balance,
    b_rotation,
    page_stride,
    token_stride,
    first_token,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Keys of MODE.rows tokens, rotated back.

    Columns of levels, like rows of the rotation, stand in the order (word, lane, group).
    """
    GROUPS: tl.constexpr = SHAPE.key_groups
    CODE: tl.constexpr = SHAPE.key_code
    PART: tl.constexpr = columns_of_part(SHAPE.tile_dim)
    DTYPE: tl.constexpr = p_cache.dtype.element_ty
    words, signs = key_words(p_section, first_token, MODE.rows, SHAPE)
    x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 0, MODE.ptx)
    x = interleaved(x0, x1, x2, x3)
    if GROUPS > 1:
        x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 1, MODE.ptx)
        x_1 = interleaved(x0, x1, x2, x3)
        if GROUPS == 4:
            x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 2, MODE.ptx)
            x = _beside(x, interleaved(x0, x1, x2, x3))
            x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 3, MODE.ptx)
            x_1 = _beside(x_1, interleaved(x0, x1, x2, x3))
        x = _beside(x, x_1)
    o_token = first_token + tl.arange(0, MODE.rows)
    o_row, m_row = rows(p_slots, o_token, page_stride, token_stride, MODE.cache_tokens)
    scales = tl.load((p_section + SHAPE.key_scales).to(tl.pointer_type(tl.float16)) + o_token)
    scales = scales.to(tl.float32)
    if CODE < 8:  # one comparison a token; bytes of e4m3 have too large levels for it
        scales = tl.where(scales > largest_scale(CODE), largest_scale(CODE), scales)
    # a level times a scale is exact in float32, so fused or not the sum is the same
    x = x.to(tl.float32) * (scales * (1.0 / _KEY_UNIT))[:, None]
    if SHAPE.centered:
        column = tl.arange(0, SHAPE.tile_dim)
        o_center = (column % GROUPS) * (SHAPE.head_dim // GROUPS) + column // GROUPS
        p_center = (p_section + SHAPE.key_center).to(tl.pointer_type(tl.float16)) + o_center
        center = tl.load(p_center, mask=column // GROUPS < SHAPE.head_dim // GROUPS, other=0.0)
        x += (center.to(tl.float32) * (1.0 / _KEY_UNIT))[None, :]
    if CODE == 8:
        x = _finite(x)
    x_half = x.to(tl.float16)
    if DTYPE.is_fp32():
        x_rest = ((x - x_half.to(tl.float32)) * _REST_UNIT).to(tl.float16)
    for part in tl.static_range(SHAPE.tile_dim // PART):
        o_channel = part * PART + tl.arange(0, PART)
        m_channel = o_channel < SHAPE.head_dim
        y = _product(x_half, b_rotation[part])
        if DTYPE.is_fp32():
            y += _product(x_rest, b_rotation[part]) * (1.0 / _REST_UNIT)
        y *= _KEY_UNIT / SHAPE.head_dim
        if MODE.balanced:
            y *= tl.load(p_balance + o_channel, mask=m_channel, other=1.0)[None, :]
        p_rows = p_cache + o_row[:, None] + o_channel[None, :]
        tl.store(p_rows, rounded(y, DTYPE, MODE.ptx), mask=m_row[:, None] & m_channel[None, :])


@triton.jit
def _rows_of_lanes(x0, x1, x2, x3):
    """Rows of four lanes one below the other, word by word: ``[words, 4, channels]``."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (x0.shape[0], 4, x0.shape[1]))


@triton.jit
def _below(x, y):
    """Rows of two groups one below the other, word by word."""
    joined = tl.permute(tl.join(x, y), (0, 3, 1, 2))
    return tl.reshape(joined, (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit
def rotate_values(
    p_section,
    p_cache,
    p_slots,
    b_rotation,
    page_stride,
    token_stride,
    first_token,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Values of MODE.rows tokens, rotated back; rows of levels in the order (word, group, lane)."""
    GROUPS: tl.constexpr = SHAPE.value_groups
    CODE: tl.constexpr = SHAPE.value_code
    PART: tl.constexpr = columns_of_part(SHAPE.tile_dim)
    DTYPE: tl.constexpr = p_cache.dtype.element_ty
    first_word = first_token // (4 * GROUPS)
    words, signs = value_words(p_section, first_word, MODE.rows // (4 * GROUPS), SHAPE)
    x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 0, MODE.ptx)
    x = _rows_of_lanes(x0, x1, x2, x3)
    if GROUPS > 1:
        x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 1, MODE.ptx)
        x = _below(x, _rows_of_lanes(x0, x1, x2, x3))
        if GROUPS == 4:
            x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 2, MODE.ptx)
            x_2 = _rows_of_lanes(x0, x1, x2, x3)
            x0, x1, x2, x3 = group_levels(words, signs, tables, CODE, 3, MODE.ptx)
            x = _below(x, _below(x_2, _rows_of_lanes(x0, x1, x2, x3)))
    x = tl.reshape(x, (MODE.rows, SHAPE.tile_dim))
    row = tl.arange(0, MODE.rows)
    group, word = (row // 4) % GROUPS, first_word + row // (4 * GROUPS)
    o_token = group * (SHAPE.page_tokens // GROUPS) + 4 * word + row % 4
    o_row, m_row = rows(p_slots, o_token, page_stride, token_stride, MODE.cache_tokens)
    scales = tl.load((p_section + SHAPE.value_scales).to(tl.pointer_type(tl.float16)) + o_token)
    scales = scales.to(tl.float32) * (1.0 / SHAPE.head_dim)
    for part in tl.static_range(SHAPE.tile_dim // PART):
        o_channel = part * PART + tl.arange(0, PART)
        y = _product(x, b_rotation[part]) * scales[:, None]
        p_rows = p_cache + o_row[:, None] + o_channel[None, :]
        mask = m_row[:, None] & (o_channel < SHAPE.head_dim)[None, :]
        tl.store(p_rows, rounded(y, DTYPE, MODE.ptx), mask=mask)
