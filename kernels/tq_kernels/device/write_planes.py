"""Device functions that write the planes of a page for a tile of tokens: words, sign words, plain numbers.

Rows of a tile stand in the order (word, group, word, lane) of values' words, `page_rows`. Columns of a
rotated tile leave the tensor cores in the order (word, group, lane, word, lane), in which a thread holds
whole words of keys; `quad_order` brings the lanes of a word side by side.
"""

import triton
import triton.language as tl

from tq_kernels.device.encode import bfloat16_bits, e4m3_bytes
from tq_kernels.device.pack import finish, four, join_groups, transpose_bytes, transpose_nibbles


@triton.jit
def page_rows(i_tile, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Offset in the page of every row of a tile of tokens, ordered (word, group, word, lane)."""
    GROUPS: tl.constexpr = SHAPE.value_groups
    LOW: tl.constexpr = 2 if SHAPE.value_groups == 2 else 1
    row = tl.arange(0, ROWS)
    lane, low = row % 4, (row // 4) % LOW
    group, high = (row // (4 * LOW)) % GROUPS, row // (4 * LOW * GROUPS)
    word = i_tile * (ROWS // (4 * GROUPS)) + high * LOW + low
    return group * (SHAPE.page_tokens // GROUPS) + word * 4 + lane


@triton.jit
def tile_of(offset, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Which tile of a page holds a token: the inverse of `page_rows`."""
    GROUPS: tl.constexpr = SHAPE.value_groups
    return (offset % (SHAPE.page_tokens // GROUPS)) // (ROWS // GROUPS)


@triton.jit
def _quad_of(i_quad, SHAPE: tl.constexpr):
    """Number of a quad, its first channel over four, and whether there is such a quad."""
    GROUPS: tl.constexpr = SHAPE.key_groups
    QUADS: tl.constexpr = SHAPE.head_dim // (4 * GROUPS)
    word = (i_quad % 4) * (SHAPE.tile_dim // (16 * GROUPS)) + i_quad // (4 * GROUPS)
    return ((i_quad // 4) % GROUPS) * QUADS + word, word < QUADS


@triton.jit
def quad_columns(SHAPE: tl.constexpr):
    """Number of every quad of a rotated tile, first channel over four, and whether there is such a quad."""
    return _quad_of(tl.arange(0, SHAPE.tile_dim // 4), SHAPE)


@triton.jit
def quad_order(y, SHAPE: tl.constexpr):
    """A rotated tile with the channels of every quad side by side, quads in the order of `quad_columns`."""
    ROWS: tl.constexpr = y.shape[0]
    y = tl.reshape(y, (ROWS, SHAPE.tile_dim // 16, 2, 4, 2))
    return tl.reshape(tl.permute(y, (0, 1, 3, 2, 4)), (ROWS, SHAPE.tile_dim))


@triton.jit
def channel_columns(SHAPE: tl.constexpr):
    """Channel of every column in that order, and whether there is such a channel."""
    column = tl.arange(0, SHAPE.tile_dim)
    b_quad, m_quad = _quad_of(column // 4, SHAPE)
    return b_quad * 4 + column % 4, m_quad


@triton.jit
def store_plain(
    p_plane,
    x,
    b_offset,
    m_row,
    CODE: tl.constexpr,
    ALONG_TOKENS: tl.constexpr,
    SHAPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Numbers of unrotated codes, each in bytes of its own."""
    ITEM: tl.constexpr = 2 if CODE == 16 else 1
    LANES: tl.constexpr = 4 // ITEM
    o_channel = tl.arange(0, SHAPE.tile_dim)
    if ALONG_TOKENS:
        b_row = (b_offset // LANES) * (LANES * SHAPE.head_dim) + b_offset % LANES
        o_item = b_row[:, None] + (o_channel * LANES)[None, :]
    else:
        o_item = b_offset[:, None] * SHAPE.head_dim + o_channel[None, :]
    mask = m_row[:, None] & (o_channel < SHAPE.head_dim)[None, :]
    if CODE == 16:
        tl.store(p_plane.to(tl.pointer_type(tl.uint16)) + o_item, bfloat16_bits(x, PTX), mask=mask)
    else:
        tl.store(p_plane + o_item, e4m3_bytes(x.to(tl.float32), PTX).to(tl.uint8), mask=mask)


@triton.jit
def store_key_words(p_section, nibbles, signs, b_offset, m_row, SHAPE: tl.constexpr, PTX: tl.constexpr):
    """Words, and sign words, of the tile's tokens: rows of planes that belong to no other token."""
    ROWS: tl.constexpr = nibbles.shape[0]
    GROUPS: tl.constexpr = SHAPE.key_groups
    WORDS: tl.constexpr = SHAPE.tile_dim // (16 * GROUPS)
    COLUMNS: tl.constexpr = SHAPE.head_dim // (4 * GROUPS)
    if SHAPE.key_code == 8:
        words = tl.reshape(nibbles, (ROWS, WORDS, 4))
    else:
        nibbles = tl.permute(tl.reshape(nibbles, (ROWS, WORDS, GROUPS, 4)), (0, 1, 3, 2))
        signs = tl.permute(tl.reshape(signs, (ROWS, WORDS, GROUPS, 4)), (0, 1, 3, 2))
        nibbles, signs = join_groups(nibbles, signs, SHAPE.key_code, PTX)
        words, signs = finish(nibbles, signs, SHAPE.key_code)
    o_column = tl.arange(0, 4 * WORDS)
    o_word = b_offset[:, None] * COLUMNS + o_column[None, :]
    mask = m_row[:, None] & (o_column < COLUMNS)[None, :]
    words = tl.reshape(tl.permute(words, (0, 2, 1)), (ROWS, 4 * WORDS))
    tl.store((p_section + SHAPE.key_words).to(tl.pointer_type(tl.uint32)) + o_word, words, mask=mask)
    if SHAPE.key_code == 3:
        signs = tl.reshape(tl.permute(signs, (0, 2, 1)), (ROWS, 4 * WORDS))
        p_signs = (p_section + SHAPE.key_signs).to(tl.pointer_type(tl.uint16))
        tl.store(p_signs + o_word, signs.to(tl.uint16), mask=mask)


@triton.jit
def store_value_words(p_section, nibbles, signs, m_row, i_tile, SHAPE: tl.constexpr, PTX: tl.constexpr):
    """Words of the tile's tokens, with the bits of other tokens as they are."""
    ROWS: tl.constexpr = nibbles.shape[0]
    GROUPS: tl.constexpr = SHAPE.value_groups
    LOW: tl.constexpr = 2 if GROUPS == 2 else 1
    HIGH: tl.constexpr = ROWS // (4 * LOW * GROUPS)
    QUADS: tl.constexpr = SHAPE.tile_dim // 4
    CODE: tl.constexpr = SHAPE.value_code
    nibbles = tl.permute(tl.reshape(nibbles, (HIGH, GROUPS, LOW, 4, QUADS)), (0, 2, 3, 4, 1))
    signs = tl.permute(tl.reshape(signs, (HIGH, GROUPS, LOW, 4, QUADS)), (0, 2, 3, 4, 1))
    nibbles, signs = join_groups(nibbles, signs, CODE, PTX)
    nibbles = tl.permute(tl.reshape(nibbles, (HIGH, LOW, 2, 2, QUADS)), (0, 1, 4, 2, 3))
    signs = tl.permute(tl.reshape(signs, (HIGH, LOW, 2, 2, QUADS)), (0, 1, 4, 2, 3))
    n0, n1, n2, n3 = four(nibbles)
    s0, s1, s2, s3 = four(signs)
    n0, n1, n2, n3 = transpose_nibbles(n0, n1, n2, n3, PTX)
    s0, s1, s2, s3 = transpose_bytes(s0, s1, s2, s3, PTX)
    n0, s0 = finish(n0, s0, CODE)
    n1, s1 = finish(n1, s1, CODE)
    n2, s2 = finish(n2, s2, CODE)
    n3, s3 = finish(n3, s3, CODE)

    o_column, m_column = channel_columns(SHAPE)
    o_word = i_tile * (HIGH * LOW) + tl.arange(0, HIGH * LOW)
    o_plane = o_word[:, None] * SHAPE.head_dim + o_column[None, :]
    held, held_signs = _held_bits(m_row, SHAPE)
    p_words = (p_section + SHAPE.value_words).to(tl.pointer_type(tl.uint32)) + o_plane
    _merge(p_words, _quads_to_columns(n0, n1, n2, n3), held, 0xFFFFFFFF, m_column)
    if CODE == 3:
        p_signs = (p_section + SHAPE.value_signs).to(tl.pointer_type(tl.uint16)) + o_plane
        _merge(p_signs, _quads_to_columns(s0, s1, s2, s3), held_signs, 0xFFFF, m_column)


@triton.jit
def store_value_bytes(p_section, words, b_offset, m_row, SHAPE: tl.constexpr):
    """E4M3_SCALED values: a byte each, four tokens of a channel to a word."""
    b_quad, m_quad = quad_columns(SHAPE)
    o_byte = ((b_offset // 4) * (4 * SHAPE.head_dim) + b_offset % 4)[:, None] + (b_quad * 16)[None, :]
    mask = m_row[:, None] & m_quad[None, :]
    for channel in tl.static_range(4):
        byte = ((words >> (8 * channel)) & 0xFF).to(tl.uint8)
        tl.store(p_section + SHAPE.value_words + o_byte + 4 * channel, byte, mask=mask)


@triton.jit
def _held_bits(m_row, SHAPE: tl.constexpr):
    """Bits of every word, and of every sign word, that belong to rows of the tile."""
    GROUPS: tl.constexpr = SHAPE.value_groups
    LOW: tl.constexpr = 2 if GROUPS == 2 else 1
    HIGH: tl.constexpr = m_row.shape[0] // (4 * LOW * GROUPS)
    group, lane = tl.arange(0, GROUPS)[:, None], tl.arange(0, 4)[None, :]
    if SHAPE.value_code == 4:
        nibble, sign = 7 << (16 * group + 4 * lane), (0x80 >> (4 * group)) << (8 * lane)
    elif SHAPE.value_code == 3:
        nibble = 3 << (2 * (group % 2) + 16 * (group // 2) + 4 * lane)
        sign = (0x80 >> group) << (8 * lane)
    else:
        nibble, sign = 1 << (group + 4 * lane), (0x80 >> group) << (8 * lane)
    held = tl.permute(tl.reshape(m_row.to(tl.int32), (HIGH, GROUPS, LOW, 4)), (0, 2, 1, 3))
    nibbles = tl.sum(tl.sum(held * nibble[None, None], axis=3), axis=2)
    signs = tl.sum(tl.sum(held * sign[None, None], axis=3), axis=2)
    words, signs = finish(
        nibbles.to(tl.uint32, bitcast=True), signs.to(tl.uint32, bitcast=True), SHAPE.value_code
    )
    return tl.reshape(words, (HIGH * LOW,)), tl.reshape(signs, (HIGH * LOW,))


@triton.jit
def _quads_to_columns(x0, x1, x2, x3):
    """Words ``[rows, columns]`` of four channels of quads."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(joined, (x0.shape[0] * x0.shape[1], 4 * x0.shape[2]))


@triton.jit
def _merge(p_words, words, held, FULL: tl.constexpr, m_column):
    """Store words whose held bits count; words that are not held as a whole keep their other bits."""
    ITEM: tl.constexpr = p_words.dtype.scalar.element_ty
    m_old = ((held != 0) & (held != FULL))[:, None] & m_column[None, :]
    old = tl.load(p_words, mask=m_old, other=0).to(tl.uint32)
    words = (words & held[:, None]) | (old & (held ^ FULL)[:, None])
    tl.store(p_words, words.to(ITEM), mask=(held != 0)[:, None] & m_column[None, :])
