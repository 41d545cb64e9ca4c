"""Queries as the attention kernels take them: balanced, rotated, scaled and in float16, by KV head."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_seqs", "num_columns", "padded_columns"])
def prepare_query(
    p_query,
    p_balance,
    p_rotation,
    p_lengths,
    p_given_positions,
    p_prepared,
    p_positions,
    num_seqs,
    num_kv_heads,
    num_columns,
    padded_columns,
    factor,
    query_seq_stride,
    query_row_stride,
    query_head_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M columns of all sequences and KV heads in one run, N channels; grid (columns / M, channels / N).

    `p_rotation` is head_dim times the rotation, integers that float16 has exactly, or None. A query goes
    through the product as the sum of two float16, which carries 22 of its bits.
    """
    o_flat = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    o_pair = o_flat // padded_columns
    column = o_flat % padded_columns
    i_seq = o_pair // num_kv_heads
    i_head = o_pair % num_kv_heads
    o_d = tl.arange(0, D_TILE)
    m_d = o_d < D
    m_flat = i_seq < num_seqs
    m_query = (m_flat & (column < num_columns))[:, None] & m_d[None, :]
    row = i_seq * query_seq_stride + column // GROUP * query_row_stride
    row += (i_head * GROUP + column % GROUP) * query_head_stride
    b_query = tl.load(p_query + row[:, None] + o_d[None, :], mask=m_query, other=0.0).to(tl.float32)
    if p_balance is not None:
        p_b = p_balance + i_head[:, None] * D + o_d[None, :]
        b_query = b_query * tl.load(p_b, mask=m_query, other=0.0)
    p_out = p_prepared + o_flat[:, None] * D
    if p_rotation is not None:
        b_high = b_query.to(tl.float16)
        b_low = (b_query - b_high.to(tl.float32)).to(tl.float16)
        o_n = tl.program_id(1) * N + tl.arange(0, N)
        m_n = o_n < D
        p_r = p_rotation + o_n[None, :] * D + o_d[:, None]
        b_rotation = tl.load(p_r, mask=m_d[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_low, b_rotation, tl.dot(b_high, b_rotation)) * factor
        tl.store(p_out + o_n[None, :], b_out.to(tl.float16), mask=m_flat[:, None] & m_n[None, :])
    else:
        b_out = (b_query * factor).to(tl.float16)
        tl.store(p_out + o_d[None, :], b_out, mask=m_flat[:, None] & m_d[None, :])

    if p_positions is not None:
        m_first = m_flat & (column == 0) & (i_head == 0) & (tl.program_id(1) == 0)
        if p_given_positions is not None:
            b_position = tl.load(p_given_positions + i_seq, mask=m_first, other=0)
        else:
            b_position = tl.load(p_lengths + i_seq, mask=m_first, other=0) - 1
        tl.store(p_positions + i_seq, b_position, mask=m_first)
