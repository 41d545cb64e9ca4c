"""Device functions that write tokens of a page to rows of a cache as they were packed, in the rotated domain.

Words are read once, levels are multiplied by scales, and rows are written: memory sets the speed.
"""

import triton
import triton.language as tl

from tq_kernels.device.levels import group_levels, spread_signs


@triton.jit
def rounded(x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """To nearest in the dtype; Triton's interpreter would truncate to bfloat16."""
    if DTYPE.is_bf16() and not PTX:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        number = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        number = x.to(DTYPE)
    return number


@triton.jit
def rows(p_slots, o_token, page_stride, token_stride, CACHE_TOKENS: tl.constexpr):
    """Where rows of tokens begin in a cache, of one page if CACHE_TOKENS is 0; and which are wanted."""
    slots = tl.load(p_slots + o_token)
    if CACHE_TOKENS == 0:
        o_row = slots * token_stride
    else:
        o_row = (slots // CACHE_TOKENS) * page_stride + (slots % CACHE_TOKENS) * token_stride
    return o_row, slots >= 0


@triton.jit
def interleaved(x0, x1, x2, x3):
    """Four lanes side by side: ``[rows, 4 * words]``."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(joined, (x0.shape[0], 4 * x0.shape[1]))


@triton.jit
def key_words(p_section, first_token, TOKENS: tl.constexpr, SHAPE: tl.constexpr):
    """Words and, spread, sign words of some tokens ``[TOKENS, words]``, int32."""
    WORDS: tl.constexpr = SHAPE.head_dim // (4 * SHAPE.key_groups)
    o_word = tl.arange(0, SHAPE.tile_dim // (4 * SHAPE.key_groups))[None, :]
    offsets = (first_token + tl.arange(0, TOKENS))[:, None] * WORDS + o_word
    mask = tl.broadcast_to(o_word < WORDS, offsets.shape)
    words = tl.load((p_section + SHAPE.key_words).to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0)
    signs = words
    if SHAPE.key_code == 3:
        p_signs = (p_section + SHAPE.key_signs).to(tl.pointer_type(tl.uint16))
        signs = spread_signs(tl.load(p_signs + offsets, mask=mask, other=0))
    return words, signs


@triton.jit
def value_words(p_section, first_word, WORDS: tl.constexpr, SHAPE: tl.constexpr):
    """Words and, spread, sign words ``[WORDS, tile_dim]``, int32."""
    o_channel = tl.arange(0, SHAPE.tile_dim)[None, :]
    o_word = first_word + tl.arange(0, WORDS)
    offsets = o_word[:, None] * SHAPE.head_dim + o_channel
    mask = tl.broadcast_to(o_channel < SHAPE.head_dim, offsets.shape)
    words = tl.load(
        (p_section + SHAPE.value_words).to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0
    )
    signs = words
    if SHAPE.value_code == 3:
        p_signs = (p_section + SHAPE.value_signs).to(tl.pointer_type(tl.uint16))
        signs = spread_signs(tl.load(p_signs + offsets, mask=mask, other=0))
    return words, signs


@triton.jit
def write_keys(
    p_section,
    p_cache,
    p_slots,
    p_balance,
    page_stride,
    token_stride,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Keys as they were packed: levels times scales, and the centre."""
    GROUPS: tl.constexpr = SHAPE.key_groups
    COLUMNS: tl.constexpr = SHAPE.head_dim // GROUPS
    DTYPE: tl.constexpr = p_cache.dtype.element_ty
    o_token = tl.arange(0, SHAPE.page_tokens)
    o_row, m_row = rows(p_slots, o_token, page_stride, token_stride, MODE.cache_tokens)
    o_column = tl.arange(0, SHAPE.tile_dim // GROUPS)
    m_column = o_column < COLUMNS
    scales = 1.0
    if SHAPE.key_code <= 8:
        scales = tl.load((p_section + SHAPE.key_scales).to(tl.pointer_type(tl.float16)) + o_token)
        scales = scales.to(tl.float32)[:, None]
    if SHAPE.key_code < 16:
        words, signs = key_words(p_section, 0, SHAPE.page_tokens, SHAPE)
    for group in tl.static_range(GROUPS):
        o_channel = group * COLUMNS + o_column
        if SHAPE.key_code == 16:
            p_numbers = (p_section + SHAPE.key_words).to(tl.pointer_type(tl.bfloat16))
            o_number = o_token[:, None] * SHAPE.head_dim + o_channel[None, :]
            x = tl.load(
                p_numbers + o_number, mask=tl.broadcast_to(m_column[None, :], o_number.shape), other=0.0
            )
        else:
            x0, x1, x2, x3 = group_levels(words, signs, tables, SHAPE.key_code, group, MODE.ptx)
            x = interleaved(x0, x1, x2, x3)
        x = x.to(tl.float32) * scales
        if SHAPE.centered:
            p_center = (p_section + SHAPE.key_center).to(tl.pointer_type(tl.float16))
            x += tl.load(p_center + o_channel, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if MODE.balanced:
            x *= tl.load(p_balance + o_channel, mask=m_column, other=1.0)[None, :]
        p_rows = p_cache + o_row[:, None] + o_channel[None, :]
        tl.store(p_rows, rounded(x, DTYPE, MODE.ptx), mask=m_row[:, None] & m_column[None, :])


@triton.jit
def write_values(
    p_section, p_cache, p_slots, page_stride, token_stride, tables, SHAPE: tl.constexpr, MODE: tl.constexpr
):
    """Values as they were packed: levels times scales."""
    GROUPS: tl.constexpr = SHAPE.value_groups
    LANES: tl.constexpr = 2 if SHAPE.value_code == 16 else 4
    WORDS: tl.constexpr = SHAPE.page_tokens // (LANES * GROUPS)
    DTYPE: tl.constexpr = p_cache.dtype.element_ty
    o_word, o_channel = tl.arange(0, WORDS), tl.arange(0, SHAPE.tile_dim)
    m_channel = (o_channel < SHAPE.head_dim)[None, :]
    if SHAPE.value_code < 16:
        words, signs = value_words(p_section, 0, WORDS, SHAPE)
    else:
        p_words = (p_section + SHAPE.value_words).to(tl.pointer_type(tl.int32))
        o_plane = o_word[:, None] * SHAPE.head_dim + o_channel[None, :]
        words = tl.load(p_words + o_plane, mask=tl.broadcast_to(m_channel, o_plane.shape), other=0)
    for group in tl.static_range(GROUPS):
        if SHAPE.value_code == 16:
            lanes = (
                (words << 16).to(tl.float32, bitcast=True),
                (words & -65536).to(tl.float32, bitcast=True),
            )
        else:
            lanes = group_levels(words, signs, tables, SHAPE.value_code, group, MODE.ptx)
        for lane in tl.static_range(LANES):
            o_token = group * (SHAPE.page_tokens // GROUPS) + LANES * o_word + lane
            o_row, m_row = rows(p_slots, o_token, page_stride, token_stride, MODE.cache_tokens)
            x = lanes[lane].to(tl.float32)
            if SHAPE.value_code <= 8:
                p_scales = (p_section + SHAPE.value_scales).to(tl.pointer_type(tl.float16))
                x *= tl.load(p_scales + o_token).to(tl.float32)[:, None]
            p_rows = p_cache + o_row[:, None] + o_channel[None, :]
            tl.store(p_rows, rounded(x, DTYPE, MODE.ptx), mask=m_row[:, None] & m_channel)
