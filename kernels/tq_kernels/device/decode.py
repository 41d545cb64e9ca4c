"""The split kernel of decode attention in plain Triton: one run of pages for some query columns of a KV head.

Tokens fill the wide side of both products and queries the narrow one:

    scores^T [tokens, columns] = keys [tokens, channels] x queries^T
    output^T [channels, columns] += values^T [channels, tokens] x probabilities^T

Tokens and channels are taken in the order in which they leave their words, see `unpack.element`.
"""

import triton
import triton.language as tl

from tq_kernels.device.unpack import element, elements_of, levels_of, load_tile, tile_slots, unit_of

HEADROOM = tl.constexpr(14.0)
"""Probabilities are kept 2**14 times as large as they are, so that float16 holds small ones."""
_EXPONENT = tl.constexpr(0x7F800000)
_SMALLEST_POWER = tl.constexpr((127 - 60) << 23)
"""2**-60, which stands for the scale of zeros; other float16 end at 2**-24."""


@triton.jit
def capped(x, cap_log2):
    """``cap_log2 * tanh(x)``: the query was divided by the cap, scores go on in base 2."""
    return cap_log2 * (1.0 - 2.0 / (tl.exp2(tl.minimum(x, 32.0) * 2.8853900817779268) + 1.0))


@triton.jit
def token_factors(key_scales, value_scales, mask, KEY: tl.constexpr, VALUE: tl.constexpr):
    """What tokens of a tile do to their scores and probabilities.

    Probabilities are kept relative to about the largest p * scale of a value, so that float16 holds them: the
    exponent of that scale is added to a score and taken out of sums, its mantissa stays with p.

    Returns:
        A factor on scores; a term of scores, -inf for tokens outside the mask; factors on p within sums and
        as an operand. Tokens outside the mask may have any scales.
    """
    factor = tl.full(key_scales.shape, unit_of(KEY), dtype=tl.float32)
    if KEY <= 8:
        factor *= tl.where(mask, key_scales.to(tl.float32), 1.0)
    term = tl.zeros(value_scales.shape, dtype=tl.float32)
    in_sums = tl.full(value_scales.shape, 1.0, dtype=tl.float32)
    as_operand = in_sums
    if VALUE <= 8:
        scales = tl.where(mask, value_scales.to(tl.float32), 1.0)
        power = tl.maximum(scales.to(tl.int32, bitcast=True) & _EXPONENT, _SMALLEST_POWER)
        term = ((power >> 23) - 127).to(tl.float32)
        in_sums = (0x7F000000 - power).to(tl.float32, bitcast=True)  # its reciprocal
        as_operand = scales * in_sums
    return factor, tl.where(mask, term, -float("inf")), in_sums, as_operand


@triton.jit(
    do_not_specialize=["table_stride", "num_columns", "padded_columns", "num_splits", "num_sinks", "window"]
)
def attend_split(
    p_query,
    p_pages,
    p_table,
    p_lengths,
    p_positions,
    p_sink_rows,
    p_out,
    p_lse,
    table_stride,
    page_stride,
    num_kv_heads,
    num_columns,
    padded_columns,
    num_splits,
    num_sinks,
    window,
    cap_log2,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    MANY_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Grid (splits, tiles of C columns x KV heads, sequences); a split takes its share of visible pages.

    A sequence whose entry of `p_sink_rows` is negative has no raw sinks: its pages are read from the start.
    """
    D: tl.constexpr = SHAPE.head_dim
    D_TILE: tl.constexpr = SHAPE.tile_dim
    P: tl.constexpr = SHAPE.page_tokens
    KEY: tl.constexpr = SHAPE.key_code
    VALUE: tl.constexpr = SHAPE.value_code
    TILES: tl.constexpr = P // N
    i_split = tl.program_id(0)
    i_head = tl.program_id(1) % num_kv_heads
    i_seq = tl.program_id(2)
    length = tl.load(p_lengths + i_seq)
    position = tl.load(p_positions + i_seq)
    first_row = position - num_columns // GROUP + 1
    end = tl.minimum(length, position + 1)
    first = num_sinks
    if p_sink_rows is not None:
        first = tl.where(tl.load(p_sink_rows + i_seq) < 0, 0, first)
    if WINDOW:
        first = tl.maximum(first, first_row - window + 1)
    first_page = first // P
    num_pages = tl.maximum((end + P - 1) // P - first_page, 0)
    per_split = (num_pages + num_splits - 1) // num_splits
    start = i_split * per_split
    stop = tl.minimum(start + per_split, num_pages)

    o_c = tl.program_id(1) // num_kv_heads * C + tl.arange(0, C)
    latest = first_row + o_c // GROUP
    o_k = tl.arange(0, D_TILE)
    pair = i_seq.to(tl.int64) * num_kv_heads + i_head
    p_q = p_query + (pair * padded_columns + o_c)[None, :] * D + element(o_k, D, KEY)[:, None]
    m_query = (o_k // elements_of(KEY) < D // elements_of(KEY))[:, None] & (o_c < padded_columns)[None, :]
    b_query = tl.load(p_q, mask=m_query, other=0.0)

    b_out = tl.zeros([D_TILE, C], dtype=tl.float32)
    b_max = tl.full([C], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([N, C], dtype=tl.float32)
    p_table += i_seq.to(tl.int64) * table_stride + first_page
    p_pages += i_head.to(tl.int64) * SHAPE.section_bytes
    m_exists = start < stop
    page = tl.load(p_table + start, mask=m_exists, other=0).to(tl.int64)
    b_ahead = load_tile(p_pages + page * page_stride, 0, m_exists, N, SHAPE)
    for tile in range(start * TILES, stop * TILES):
        # a tile is loaded while the one before it is worked on
        k_words, k_signs, v_words, v_signs, b_k_scale, b_v_scale, b_center = b_ahead
        following = tl.minimum(tile + 1, stop * TILES - 1)
        page = tl.load(p_table + following // TILES).to(tl.int64)
        b_ahead = load_tile(p_pages + page * page_stride, following % TILES, m_exists, N, SHAPE)
        o_token = (first_page + tile // TILES) * P + tile_slots(tile % TILES, N, SHAPE)
        m_token = (o_token >= first) & (o_token < end)
        b_scores = tl.dot(levels_of(k_words, k_signs, KEY, PTX), b_query)
        b_scale, b_term, b_in_sums, b_as_operand = token_factors(b_k_scale, b_v_scale, m_token, KEY, VALUE)
        b_shift = tl.zeros([C], dtype=tl.float32)
        if SHAPE.centered:
            b_rows = tl.broadcast_to(b_center[None, :], [16, D_TILE])
            b_shift = tl.max(tl.dot(b_rows, b_query), axis=0)
        b_scores = b_scores * b_scale[:, None] + b_shift[None, :]
        if SOFTCAP:
            b_scores = capped(b_scores, cap_log2)
        m_seen = m_token[:, None]
        if MANY_ROWS:
            m_seen = m_seen & (o_token[:, None] <= latest[None, :])
            if WINDOW:
                m_seen = m_seen & (o_token[:, None] > latest[None, :] - window)
        b_scores = tl.where(m_seen, b_scores + b_term[:, None], -float("inf"))
        b_next = tl.maximum(b_max, tl.max(b_scores, axis=0))
        b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
        b_fade = tl.exp2(b_max - b_base)
        b_max = b_next
        b_p = tl.exp2(b_scores - (b_base - HEADROOM)[None, :])
        b_sum = b_sum * b_fade[None, :] + b_p * b_in_sums[:, None]
        b_values = levels_of(v_words, v_signs, VALUE, PTX)
        if VALUE == 16:
            b_values = tl.where(m_token[None, :], b_values, 0.0)
        b_p = (b_p * b_as_operand[:, None]).to(tl.float16)
        b_out = tl.dot(b_values, b_p, b_out * b_fade[None, :])

    b_total = tl.sum(b_sum, axis=0)
    m_any = b_total > 0
    b_total = tl.where(m_any, b_total, 1.0)
    b_lse = tl.where(m_any, b_max - HEADROOM + tl.log2(b_total), -float("inf"))
    row = (pair * num_splits + i_split) * num_columns + o_c
    m_c = o_c < num_columns
    tl.store(p_lse + row, b_lse, mask=m_c)
    b_out = b_out * (unit_of(VALUE) / b_total)[None, :]
    o_d = tl.arange(0, D_TILE)
    p_o = p_out + row[None, :] * D + o_d[:, None]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=(o_d < D)[:, None] & (m_c & m_any)[None, :])
