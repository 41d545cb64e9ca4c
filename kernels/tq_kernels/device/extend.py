"""Attention of a chunk of new queries: over compressed pages without inflating them, and over the raw chunk.

Queries fill the wide side of both products here. A tile of a page is unpacked in registers once for all
columns of a program, a column being a new token and a query head of one KV head. Both kernels leave partial
results in the rotated domain of values, to be merged by `merge_splits`.
"""

import triton
import triton.language as tl

from tq_kernels.device.decode import HEADROOM, capped, token_factors
from tq_kernels.device.unpack import element, elements_of, levels_of, load_tile, tile_slots, unit_of


@triton.jit(
    do_not_specialize=[
        "prefix_len",
        "first_position",
        "num_columns",
        "padded_columns",
        "num_splits",
        "num_sinks",
        "window",
    ],
    do_not_specialize_on_alignment=["p_table"],  # a row of a table, read a number at a time
)
def attend_prefix(
    p_query,
    p_pages,
    p_table,
    p_out,
    p_lse,
    prefix_len,
    first_position,
    num_columns,
    padded_columns,
    page_stride,
    num_splits,
    num_sinks,
    window,
    cap_log2,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """M columns of one KV head over one split of the prefix; grid (tiles of columns, KV heads, splits)."""
    D: tl.constexpr = SHAPE.head_dim
    D_TILE: tl.constexpr = SHAPE.tile_dim
    P: tl.constexpr = SHAPE.page_tokens
    KEY: tl.constexpr = SHAPE.key_code
    VALUE: tl.constexpr = SHAPE.value_code
    TILES: tl.constexpr = P // N
    i_head = tl.program_id(1)
    i_split = tl.program_id(2)
    o_c = tl.program_id(0) * M + tl.arange(0, M)
    position = first_position + o_c // GROUP
    first = num_sinks
    if WINDOW:
        first = tl.maximum(first, first_position + tl.program_id(0) * M // GROUP - window + 1)
    first_page = first // P
    num_pages = tl.maximum((prefix_len + P - 1) // P - first_page, 0)
    per_split = (num_pages + num_splits - 1) // num_splits
    start = i_split * per_split
    stop = tl.minimum(start + per_split, num_pages)

    o_d = tl.arange(0, D_TILE)
    p_q = p_query + (i_head.to(tl.int64) * padded_columns + o_c)[:, None] * D + element(o_d, D, KEY)[None, :]
    m_query = (o_c < padded_columns)[:, None] & (o_d // elements_of(KEY) < D // elements_of(KEY))[None, :]
    b_query = tl.load(p_q, mask=m_query, other=0.0)

    b_out = tl.zeros([M, D_TILE], dtype=tl.float32)
    b_max = tl.full([M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([M], dtype=tl.float32)
    p_table += first_page
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
        m_token = (o_token >= first) & (o_token < prefix_len)
        b_scores = tl.dot(b_query, tl.trans(levels_of(k_words, k_signs, KEY, PTX)))
        b_scale, b_term, b_in_sums, b_as_operand = token_factors(b_k_scale, b_v_scale, m_token, KEY, VALUE)
        b_shift = tl.zeros([M], dtype=tl.float32)
        if SHAPE.centered:
            b_columns = tl.trans(tl.broadcast_to(b_center[None, :], [16, D_TILE]))
            b_shift = tl.max(tl.dot(b_query, b_columns), axis=1)
        if SOFTCAP:
            b_scores = capped(b_scores * b_scale[None, :] + b_shift[:, None], cap_log2) + b_term[None, :]
            b_shift = tl.zeros([M], dtype=tl.float32)
        else:
            b_scores = b_scores * b_scale[None, :] + b_term[None, :]
        if KEY == 16:
            b_scores = tl.where(m_token[None, :], b_scores, -float("inf"))
        if WINDOW:
            m_seen = o_token[None, :] > position[:, None] - window
            b_scores = tl.where(m_seen, b_scores, -float("inf"))
        b_next = tl.maximum(b_max, tl.max(b_scores, axis=1) + b_shift)
        b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
        b_fade = tl.exp2(b_max - b_base)
        b_max = b_next
        b_p = tl.exp2(b_scores + (b_shift + HEADROOM - b_base)[:, None])
        b_sum = b_sum * b_fade + tl.sum(b_p * b_in_sums[None, :], axis=1)

        b_values = levels_of(v_words, v_signs, VALUE, PTX)
        if VALUE == 16:
            b_values = tl.where(m_token[None, :], b_values, 0.0)
        b_p = (b_p * b_as_operand[None, :]).to(tl.float16)
        b_out = tl.dot(b_p, tl.trans(b_values), b_out * b_fade[:, None])

    m_c = o_c < num_columns
    m_any = b_sum > 0
    b_total = tl.where(m_any, b_sum, 1.0)
    b_lse = tl.where(m_any, b_max - HEADROOM + tl.log2(b_total), -float("inf"))
    row = (i_head.to(tl.int64) * num_splits + i_split) * num_columns + o_c
    tl.store(p_lse + row, b_lse, mask=m_c)
    b_out = b_out * (unit_of(VALUE) / b_total)[:, None]
    m_out = (m_c & m_any)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(
    do_not_specialize=["prefix_len", "first_position", "num_tokens", "num_columns", "num_sinks", "window"]
)
def attend_raw(
    p_query,
    p_keys,
    p_values,
    p_rotation,
    p_out,
    p_lse,
    prefix_len,
    first_position,
    num_tokens,
    num_columns,
    num_sinks,
    window,
    score_factor,
    cap_log2,
    query_row_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """M columns of one KV head over raw tokens; grid (tiles of columns, KV heads).

    The first num_sinks of num_tokens stand at positions 0 and on, the others at prefix_len and on.
    """
    DOT: tl.constexpr = tl.float32 if AS_FLOAT else p_keys.dtype.element_ty
    i_head = tl.program_id(1).to(tl.int64)
    first_c = tl.program_id(0) * M
    o_c = first_c + tl.arange(0, M)
    m_c = o_c < num_columns
    position = first_position + o_c // GROUP
    last_row = first_position + (tl.minimum(first_c + M, num_columns) - 1) // GROUP
    end = tl.minimum(num_tokens, num_sinks + last_row - prefix_len + 1)
    start = 0
    if WINDOW:
        # sinks are left out only where no row sees one
        first_seen = first_position + first_c // GROUP - window + 1
        start = tl.where(first_seen >= num_sinks, num_sinks + tl.maximum(first_seen - prefix_len, 0), 0)

    o_d = tl.arange(0, D_TILE)
    m_d = o_d < D
    row, head = (o_c // GROUP).to(tl.int64), i_head * GROUP + o_c % GROUP
    p_q = p_query + (row * query_row_stride + head * query_head_stride)[:, None] + o_d[None, :]
    b_query = tl.load(p_q, mask=m_c[:, None] & m_d[None, :], other=0.0).to(DOT)
    b_out = tl.zeros([M, D_TILE], dtype=tl.float32)
    b_max = tl.full([M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([M], dtype=tl.float32)
    for first in range(start, end, N):
        o_t = first + tl.arange(0, N)
        m_t = o_t < end
        o_row = o_t.to(tl.int64)
        p_k = p_keys + i_head * key_head_stride + o_row[None, :] * key_token_stride + o_d[:, None]
        b_keys = tl.load(p_k, mask=m_d[:, None] & m_t[None, :], other=0.0).to(DOT)
        b_scores = tl.dot(b_query, b_keys, input_precision="ieee") * score_factor
        if SOFTCAP:
            b_scores = capped(b_scores, cap_log2)
        o_token = tl.where(o_t < num_sinks, o_t, prefix_len + o_t - num_sinks)
        m_seen = m_t[None, :] & (o_token[None, :] <= position[:, None])
        if WINDOW:
            m_seen = m_seen & (o_token[None, :] > position[:, None] - window)
        b_scores = tl.where(m_seen, b_scores, -float("inf"))
        b_next = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
        b_fade = tl.exp2(b_max - b_base)
        b_max = b_next
        b_p = tl.exp2(b_scores - (b_base - HEADROOM)[:, None])
        b_sum = b_sum * b_fade + tl.sum(b_p, axis=1)
        p_v = p_values + i_head * value_head_stride + o_row[:, None] * value_token_stride + o_d[None, :]
        b_values = tl.load(p_v, mask=m_t[:, None] & m_d[None, :], other=0.0).to(DOT)
        b_out = tl.dot(b_p.to(DOT), b_values, b_out * b_fade[:, None], input_precision="ieee")

    m_any = b_sum > 0
    b_total = tl.where(m_any, b_sum, 1.0)
    b_lse = tl.where(m_any, b_max - HEADROOM + tl.log2(b_total), -float("inf"))
    out_row = i_head * num_columns + o_c
    tl.store(p_lse + out_row, b_lse, mask=m_c)
    b_out = b_out / b_total[:, None]
    p_o = p_out + out_row[:, None] * D
    if p_rotation is not None:
        b_high = b_out.to(tl.float16)
        b_low = (b_out - b_high.to(tl.float32)).to(tl.float16)
        for block in tl.static_range(0, D_TILE, BLOCK):
            o_n = block + tl.arange(0, BLOCK)
            m_n = o_n < D
            p_r = p_rotation + o_n[None, :] * D + o_d[:, None]
            b_rotation = tl.load(p_r, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_turned = tl.dot(b_low, b_rotation, tl.dot(b_high, b_rotation)) * (1.0 / D)
            b_turned = b_turned.to(p_out.dtype.element_ty)
            tl.store(p_o + o_n[None, :], b_turned, mask=m_c[:, None] & m_n[None, :])
    else:
        tl.store(p_o + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_c[:, None] & m_d[None, :])
