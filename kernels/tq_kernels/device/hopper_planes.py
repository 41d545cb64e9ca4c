"""Stores of a tile's words and scales to a page on Hopper, whose other tokens' bits stay as they are.

A tile has rows of both halves of a page, for these share words of values; p_plane is where its own begin.
low and high are its rows that a run has, as bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tq_kernels.device.hopper_turns import TILE_ROWS


@gluon.jit
def token_of_row(row, P: gl.constexpr):
    """Token of a row of the first tile: a warp has eight of both halves of a page."""
    return row // 16 * 8 + row % 8 + (row // 8) % 2 * (P // 2)


@gluon.jit
def rows_of_tile(low, high, i_tile, P: gl.constexpr):
    """Rows of both halves of a tile that a run has, as bits, of those of the page."""
    if P == TILE_ROWS:
        return low, high
    else:
        shift = (i_tile * (TILE_ROWS // 2)).to(gl.int64)
        return (low >> shift).to(gl.int32), (high >> shift).to(gl.int32)


@gluon.jit
def _has_row(low, high, row):
    place = token_of_row(row, TILE_ROWS)
    bits = gl.where(place < TILE_ROWS // 2, low, high)
    return ((bits >> (place % (TILE_ROWS // 2)).to(bits.dtype)) & 1) != 0


@gluon.jit
def store_rows(p_plane, x, low, high, is_whole, SHAPE: gl.constexpr):
    """Words of keys, a row a token."""
    o_row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    o_token = token_of_row(o_row, SHAPE.page_tokens)
    o_column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    p_rows = p_plane.to(gl.pointer_type(gl.int32)) + gl.expand_dims(o_token * x.shape[1], 1)
    p_words = p_rows + gl.expand_dims(o_column, 0)
    if is_whole:
        gl.store(p_words, x)
    else:
        gl.store(p_words, x, mask=gl.expand_dims(_has_row(low, high, o_row), 1))


@gluon.jit
def store_scales(p_plane, scales, low, high, is_whole, SHAPE: gl.constexpr):
    """Scales of keys or of values."""
    o_row = gl.arange(0, scales.shape[0], layout=scales.type.layout)
    p_scales = p_plane.to(gl.pointer_type(gl.float16)) + token_of_row(o_row, SHAPE.page_tokens)
    if is_whole:
        gl.store(p_scales, scales)
    else:
        gl.store(p_scales, scales, mask=_has_row(low, high, o_row))


@gluon.jit
def store_columns(p_plane, x, low, high, is_whole, STRIDE: gl.constexpr, FIRST: gl.constexpr):
    """Words of values from a column on, a row for four tokens of both halves of a page."""
    o_row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    o_column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    p_rows = p_plane.to(gl.pointer_type(gl.int32)) + FIRST
    p_words = p_rows + gl.expand_dims(o_row * STRIDE, 1) + gl.expand_dims(o_column, 0)
    if is_whole:
        gl.store(p_words, x)
    else:
        first = (low >> (4 * o_row).to(low.dtype)).to(gl.int32)
        second = (high >> (4 * o_row).to(high.dtype)).to(gl.int32)
        held = o_row * 0
        for lane in gl.static_range(4):
            bit = (first >> lane) & 1
            held |= bit * (7 << (4 * lane)) | (bit << (8 * lane + 7))
            bit = (second >> lane) & 1
            held |= bit * (7 << (16 + 4 * lane)) | (bit << (8 * lane + 3))
        held = gl.expand_dims(held, 1)
        old = gl.load(p_words, mask=held != 0, other=0)
        gl.store(p_words, (x & held) | (old & ~held), mask=held != 0)
