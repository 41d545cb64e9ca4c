"""Device functions that write tokens of a page to rows of a cache, rotated back.

Float16 numbers meet the integers of d R on the tensor cores. Of values they are levels, which are exact;
scales and d come after. Keys have a centre, so theirs are levels times scales plus centre: rounded once for
caches in half precision, in two parts for others.

Tensor cores hold rows and columns of a tile in an order of their own. Which token and which channel stand
where is free, so tiles are laid out such that each thread unpacks what it multiplies, where words of keys
allow it, and writes what it has summed: nothing passes through shared memory in between.
"""

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS
from tq_kernels.device.levels import group_levels
from tq_kernels.device.write_rows import interleaved, key_words, rounded, value_words

_KEY_UNIT = tl.constexpr(16.0)
"""Rotated keys are divided by it, so that a key as large as float16 allows does not overflow when rotated."""
_REST_UNIT = tl.constexpr(2048.0)
"""What float16 leaves of a key is multiplied by it, or small keys would leave subnormals of few bits."""


@triton.constexpr_function
def columns_of_part(tile_dim):
    """Columns of a product: as few as leave registers for a second program on a multiprocessor."""
    return min(tile_dim, 64) if tile_dim <= 128 else 128


@triton.constexpr_function
def matrix_unit(head_dim):
    """What the matrix for keys is divided by: head_dim over `_KEY_UNIT` where its numbers stay exact."""
    return 1.0 if head_dim & (head_dim - 1) else head_dim / _KEY_UNIT.value


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
def _fragment_rows(x):
    """Rows (half, warp, row) as (warp, half, row), eight rows each: those of a thread in an operand."""
    x = tl.reshape(x, (2, x.shape[0] // 16, 8, x.shape[1]))
    return tl.reshape(tl.permute(x, (1, 0, 2, 3)), (16 * x.shape[1], x.shape[3]))


@triton.jit
def _fragment_columns(x):
    """Columns (thread, pair, one of two) as (pair, thread, one of two), four threads: those of an operand."""
    x = tl.reshape(x, (x.shape[0], 4, x.shape[1] // 8, 2))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (x.shape[0], 8 * x.shape[2]))


@triton.jit
def _plain(y):
    """A product with rows as they were before `_fragment_rows`, columns in channel order.

    Of 32 columns a thread then holds eight channels side by side, as many as it writes at once.
    """
    y = tl.reshape(y, (y.shape[0] // 16, 2, 8, y.shape[1] // 32, 4, 4, 2))
    return tl.reshape(tl.permute(y, (1, 0, 2, 3, 5, 4, 6)), (16 * y.shape[0], 32 * y.shape[3]))


@triton.jit
def _product(x, b_rotation):
    """float16 times d R: exact products, float32 sums."""
    return tl.dot(x.to(b_rotation.dtype), b_rotation, input_precision="ieee")


@triton.jit
def _write_columns(
    y, p_rows, m_row, p_balance, first_channel, factors, SHAPE: tl.constexpr, MODE: tl.constexpr
):
    """Columns of a product times factors of rows, and the balance if there is one, to rows of a cache."""
    o_channel = first_channel + tl.arange(0, y.shape[1])
    m_channel = o_channel < SHAPE.head_dim
    y = _plain(y) * factors
    if p_balance is not None:
        y *= tl.load(p_balance + o_channel, mask=m_channel, other=1.0)[None, :]
    number = rounded(y, p_rows.dtype.element_ty, MODE.ptx)
    tl.store(p_rows[:, None] + o_channel[None, :], number, mask=m_row[:, None] & m_channel[None, :])


@triton.jit
def _write_part(y, p_rows, m_row, p_balance, first_channel, factors, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """As `_write_columns`, 32 columns at a time where threads so write 16 bytes that they hold themselves."""
    if y.shape[0] == 64 and y.shape[1] == 64 and not p_rows.dtype.element_ty.is_fp32():
        low, high = tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, 32)), (0, 2, 1)))
        _write_columns(low, p_rows, m_row, p_balance, first_channel, factors, SHAPE, MODE)
        _write_columns(high, p_rows, m_row, p_balance, first_channel + 32, factors, SHAPE, MODE)
    else:
        _write_columns(y, p_rows, m_row, p_balance, first_channel, factors, SHAPE, MODE)


@triton.jit
def tile_tokens(i_tile, KEYS: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Tokens of a page that are the rows of one of its tiles; of values in the order (word, group, lane)."""
    o_row = tl.arange(0, MODE.rows)
    if KEYS:
        o_token = i_tile * MODE.rows + o_row
    else:
        GROUPS: tl.constexpr = SHAPE.value_groups
        o_word = i_tile * (MODE.rows // (4 * GROUPS)) + o_row // (4 * GROUPS)
        o_token = (o_row // 4) % GROUPS * (SHAPE.page_tokens // GROUPS) + 4 * o_word + o_row % 4
    return o_token


@triton.jit
def _load_group_center(p_section, GROUP: tl.constexpr, SHAPE: tl.constexpr):
    """The centre's channels of a group, ``[tile_dim / groups]`` float16.

    Of no more elements than threads each thread reads those it needs, and none goes through shared memory.
    """
    COLUMNS: tl.constexpr = SHAPE.head_dim // SHAPE.key_groups
    o_column = tl.arange(0, SHAPE.tile_dim // SHAPE.key_groups)
    p_center = (p_section + SHAPE.key_center).to(tl.pointer_type(tl.float16)) + GROUP * COLUMNS
    return tl.load(p_center + o_column, mask=o_column < COLUMNS, other=0.0)


@triton.jit
def load_center(p_section, SHAPE: tl.constexpr):
    """The centre of a page by columns of keys, float16."""
    center = _load_group_center(p_section, 0, SHAPE)
    if SHAPE.key_groups > 1:
        center_1 = _load_group_center(p_section, 1, SHAPE)
        if SHAPE.key_groups == 4:
            center = tl.interleave(center, _load_group_center(p_section, 2, SHAPE))
            center_1 = tl.interleave(center_1, _load_group_center(p_section, 3, SHAPE))
        center = tl.interleave(center, center_1)
    return center


@triton.jit
def load_tile(p_section, i_tile, KEYS: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Words and spread sign words of a tile of a page."""
    if KEYS:
        words, signs = key_words(p_section, i_tile * MODE.rows, MODE.rows, SHAPE)
    else:
        WORDS: tl.constexpr = MODE.rows // (4 * SHAPE.value_groups)
        words, signs = value_words(p_section, i_tile * WORDS, WORDS, SHAPE)
    return words, signs


@triton.jit
def rotate_keys(
    tile,
    scales,
    center,
    p_rows,
    m_row,
    p_balance,
    b_rotation,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Keys that `load_tile` has read, rotated back; columns of levels in the order (word, lane, group)."""
    words, signs = tile
    GROUPS: tl.constexpr = SHAPE.key_groups
    CODE: tl.constexpr = SHAPE.key_code
    PART: tl.constexpr = columns_of_part(SHAPE.tile_dim)
    FACTOR: tl.constexpr = matrix_unit(SHAPE.head_dim) * _KEY_UNIT / SHAPE.head_dim
    IS_FP32: tl.constexpr = p_rows.dtype.element_ty.is_fp32()
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
    scales = scales.to(tl.float32)
    if CODE < 8:  # one comparison a token; bytes of e4m3 have too large levels for it
        scales = tl.where(scales > largest_scale(CODE), largest_scale(CODE), scales)
    # a level times a scale is exact in float32, so fused or not the sum is the same
    x = x.to(tl.float32) * (scales * (1.0 / _KEY_UNIT))[:, None]
    if SHAPE.centered:
        x += (center.to(tl.float32) * (1.0 / _KEY_UNIT))[None, :]
    if CODE == 8:
        x = _finite(x)
    x = _fragment_columns(_fragment_rows(x))
    x_half = x.to(tl.float16)
    if IS_FP32:
        x_rest = ((x - x_half.to(tl.float32)) * _REST_UNIT).to(tl.float16)
    p_channel_factors = p_balance if MODE.balanced else None
    for part in tl.static_range(SHAPE.tile_dim // PART):
        y = _product(x_half, b_rotation[part])
        if IS_FP32:
            y += _product(x_rest, b_rotation[part]) * (1.0 / _REST_UNIT)
        _write_part(y, p_rows, m_row, p_channel_factors, part * PART, FACTOR, SHAPE, MODE)


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
def rotate_values(tile, scales, p_rows, m_row, b_rotation, tables, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Values that `load_tile` has read, rotated back."""
    words, signs = tile
    GROUPS: tl.constexpr = SHAPE.value_groups
    CODE: tl.constexpr = SHAPE.value_code
    PART: tl.constexpr = columns_of_part(SHAPE.tile_dim)
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
    x = _fragment_rows(tl.reshape(x, (MODE.rows, SHAPE.tile_dim)))
    factors = (scales.to(tl.float32) * (1.0 / SHAPE.head_dim))[:, None]
    for part in tl.static_range(SHAPE.tile_dim // PART):
        y = _product(x, b_rotation[part])
        _write_part(y, p_rows, m_row, None, part * PART, factors, SHAPE, MODE)
