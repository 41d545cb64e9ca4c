"""Partial results over disjoint tokens become one: splits, a running result, raw sinks; then rotated back."""

import triton
import triton.language as tl

from tq_kernels.device.decode import capped
from tq_kernels.device.write_rows import rounded


@triton.jit
def _sink_values(p_sink_values, o_sink, o_n, m_s, m_n, m_seen, b_weight):
    """Weighted values of sinks, for some channels: [columns, channels]."""
    p_v = p_sink_values + o_sink[:, None] + o_n[None, :]
    b_values = tl.load(p_v, mask=m_s[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    b_values = tl.where(m_seen[:, :, None], b_values[None, :, :], 0.0)
    return tl.sum(b_values * b_weight[:, :, None], axis=1)


@triton.jit(
    do_not_specialize=[
        "num_columns",
        "num_splits",
        "partial_lse_pair_stride",
        "partial_lse_split_stride",
        "lse_seq_stride",
        "lse_row_stride",
        "lse_pair_stride",
        "num_sinks",
        "window",
    ]
)
def merge_splits(
    p_partial,
    p_partial_lse,
    p_extra,
    p_extra_lse,
    p_query,
    p_sink_keys,
    p_sink_values,
    p_sink_rows,
    p_positions,
    p_rotation,
    p_out,
    p_lse,
    num_kv_heads,
    num_columns,
    num_splits,
    partial_pair_stride,
    partial_split_stride,
    partial_column_stride,
    partial_lse_pair_stride,
    partial_lse_split_stride,
    partial_lse_column_stride,
    query_seq_stride,
    query_row_stride,
    query_head_stride,
    sink_seq_stride,
    sink_token_stride,
    sink_head_stride,
    out_seq_stride,
    out_row_stride,
    out_pair_stride,
    out_head_stride,
    lse_seq_stride,
    lse_row_stride,
    lse_pair_stride,
    lse_head_stride,
    num_sinks,
    window,
    score_factor,
    cap_log2,
    partial_lse_unit,
    lse_unit,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """C columns of one sequence and KV head; grid (sequences times KV heads, tiles of columns).

    Log-sum-exps are in base 2 inside; the units convert at the borders. An empty part has one of -inf, and
    nothing else of it is used, as it may never have been written. `p_rotation` is head_dim times the
    rotation, or None; with sinks it is never None, but without a rotation head_dim times the identity.
    `p_sink_rows` says where each sequence has its sinks, negative nowhere; without it, in its own place.
    """
    pair = tl.program_id(0).to(tl.int64)
    i_seq, i_head = pair // num_kv_heads, pair % num_kv_heads
    o_c = tl.program_id(1) * C + tl.arange(0, C)
    m_c = o_c < num_columns
    o_d = tl.arange(0, D_TILE)
    m_d = o_d < D
    m_cd = m_c[:, None] & m_d[None, :]
    row, head = (o_c // GROUP).to(tl.int64), o_c % GROUP

    b_max = tl.full([C], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([C], dtype=tl.float32)
    b_out = tl.zeros([C, D_TILE], dtype=tl.float32)
    if p_extra is not None:
        # a running result: dense, one row of head_dim numbers a column
        o_extra = pair * num_columns + o_c
        b_max = tl.load(p_extra_lse + o_extra, mask=m_c, other=-float("inf"))
        b_sum = tl.where(b_max == -float("inf"), 0.0, 1.0)
        b_out = tl.load(p_extra + o_extra[:, None] * D + o_d[None, :], mask=m_cd, other=0.0).to(tl.float32)
        b_out = tl.where((b_sum > 0)[:, None], b_out, 0.0)
    for first in range(0, num_splits, S):
        o_s = first + tl.arange(0, S)
        m_sc = (o_s < num_splits)[:, None] & m_c[None, :]
        p_part_lse = p_partial_lse + pair * partial_lse_pair_stride + o_s[:, None] * partial_lse_split_stride
        p_part_lse += o_c[None, :] * partial_lse_column_stride
        b_lse = tl.load(p_part_lse, mask=m_sc, other=-float("inf")) * partial_lse_unit
        p_part = p_partial + pair * partial_pair_stride
        p_part += (o_s.to(tl.int64) * partial_split_stride)[:, None, None] + o_d[None, None, :]
        p_part += (o_c.to(tl.int64) * partial_column_stride)[None, :, None]
        b_part = tl.load(p_part, mask=m_sc[:, :, None] & m_d[None, None, :], other=0.0).to(tl.float32)
        b_part = tl.where((b_lse == -float("inf"))[:, :, None], 0.0, b_part)
        b_next = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
        b_fade = tl.exp2(b_max - b_base)
        b_weight = tl.exp2(b_lse - b_base[None, :])
        b_max = b_next
        b_sum = b_sum * b_fade + tl.sum(b_weight, axis=0)
        b_out = b_out * b_fade[:, None] + tl.sum(b_part * b_weight[:, :, None], axis=0)

    if SINKS > 0:
        # raw tokens 0 and on of the sequence
        o_s = tl.arange(0, SINKS)
        m_s = o_s < num_sinks
        i_sinks = i_seq
        if p_sink_rows is not None:
            i_sinks = tl.load(p_sink_rows + i_seq).to(tl.int64)
            m_s = m_s & (i_sinks >= 0)
        o_sink = i_sinks * sink_seq_stride + i_head * sink_head_stride + o_s.to(tl.int64) * sink_token_stride
        p_q = p_query + i_seq * query_seq_stride + row[:, None] * query_row_stride + o_d[None, :]
        p_q += (i_head * GROUP + head)[:, None] * query_head_stride
        b_query = tl.load(p_q, mask=m_cd, other=0.0).to(tl.float32)
        p_k = p_sink_keys + o_sink[:, None] + o_d[None, :]
        b_keys = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_scores = tl.sum(b_query[:, None, :] * b_keys[None, :, :], axis=2) * score_factor
        if SOFTCAP:
            b_scores = capped(b_scores, cap_log2)
        position = tl.load(p_positions + i_seq) - (num_columns // GROUP - 1) + row
        m_seen = m_s[None, :] & (o_s[None, :] <= position[:, None])
        if WINDOW:
            m_seen = m_seen & (o_s[None, :] > position[:, None] - window)
        b_scores = tl.where(m_seen, b_scores, -float("inf"))
        b_next = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
        b_fade = tl.exp2(b_max - b_base)
        b_weight = tl.exp2(b_scores - b_base[:, None])
        b_max = b_next
        b_sum = b_sum * b_fade + tl.sum(b_weight, axis=1)
        b_out = b_out * b_fade[:, None]

    m_any = b_sum > 0
    b_norm = 1.0 / tl.where(m_any, b_sum, 1.0)
    b_total = tl.where(m_any, b_max - tl.log2(b_norm), -float("inf")) * lse_unit
    p_l = p_lse + i_seq * lse_seq_stride + row * lse_row_stride + i_head * lse_pair_stride
    tl.store(p_l + head * lse_head_stride, b_total, mask=m_c)
    b_out = b_out * b_norm[:, None]
    p_o = p_out + i_seq * out_seq_stride + i_head * out_pair_stride
    p_o = p_o + (row * out_row_stride + head * out_head_stride)[:, None]
    if p_rotation is not None:
        # as the sum of two float16 an output keeps 22 bits on its way through the product
        b_high = b_out.to(tl.float16)
        b_low = (b_out - b_high.to(tl.float32)).to(tl.float16)
        for start in tl.static_range(0, D_TILE, N):
            o_n = start + tl.arange(0, N)
            m_n = o_n < D
            p_r = p_rotation + o_d[:, None] * D + o_n[None, :]
            b_rotation = tl.load(p_r, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_back = tl.dot(b_low, b_rotation, tl.dot(b_high, b_rotation)) * (1.0 / D)
            if SINKS > 0:
                b_back += _sink_values(
                    p_sink_values, o_sink, o_n, m_s, m_n, m_seen, b_weight * b_norm[:, None]
                )
            b_back = rounded(b_back, p_out.dtype.element_ty, False)
            tl.store(p_o + o_n[None, :], b_back, mask=m_c[:, None] & m_n[None, :])
    else:
        tl.store(p_o + o_d[None, :], rounded(b_out, p_out.dtype.element_ty, False), mask=m_cd)
