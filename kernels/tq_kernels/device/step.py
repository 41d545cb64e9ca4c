"""The step kernel: what a step's tokens and sequences need to know of their pages, one sequence a program."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride", "num_seqs", "num_tokens", "num_pages", "clock"])
def prepare(
    p_table,
    p_lengths,
    p_query_start,
    p_seeds,
    p_sink_slots,
    p_sink_rows,
    p_row_of_page,
    p_page_of_row,
    p_last_used,
    p_marks,
    p_pages,
    table_stride,
    page_stride,
    num_seqs,
    num_tokens,
    num_pages,
    clock,
    mark_offset,
    OPENS: tl.constexpr,
    SINKS: tl.constexpr,
    MARK: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_seqs + 1); the last program speaks for tokens of nobody."""
    i_seq = tl.program_id(0)
    o_tile = tl.arange(0, TILE)
    if i_seq == num_seqs:
        end = tl.load(p_query_start + num_seqs)
        nothing = tl.full([TILE], -1, tl.int32)
        while end < num_tokens:
            o_token = end + o_tile
            tl.store(p_seeds + o_token, nothing, mask=o_token < num_tokens)
            if p_sink_rows is not None:
                tl.store(p_sink_slots + o_token, nothing, mask=o_token < num_tokens)
            end += TILE
    else:
        start = tl.load(p_query_start + i_seq)
        count = tl.load(p_query_start + i_seq + 1) - start
        context = tl.load(p_lengths + i_seq) - count
        p_table += i_seq.to(tl.int64) * table_stride
        row = start * 0 - 1
        if p_sink_rows is not None:
            page = tl.load(p_table)
            m_page = (page >= 0) & (page < num_pages) & (count > 0)
            page = tl.where(m_page, page, 0)
            row = tl.load(p_row_of_page + page, mask=m_page, other=-1)
            m_owned = (row >= 0) & (tl.load(p_page_of_row + tl.maximum(row, 0)) == page)
            row = tl.where(m_owned, row, -1)
            o_mark = tl.arange(0, MARK)
            p_mark = p_marks + tl.maximum(row, 0).to(tl.int64) * MARK + o_mark
            p_held = p_pages + page.to(tl.int64) * page_stride + mark_offset + o_mark
            differ = tl.sum((tl.load(p_mark) != tl.load(p_held)).to(tl.int32))
            m_same = tl.where(context == 0, OPENS, differ == 0)
            row = tl.where(m_same, row, -1)
            tl.store(p_sink_rows + i_seq, row)
            tl.store(p_last_used + tl.maximum(row, 0), clock, mask=row >= 0)
        done = 0
        while done < count:
            o_token = done + o_tile
            done += TILE
            m_token = o_token < count
            position = context + o_token
            m_opens = m_token & (position % P == 0) & (position >= P) & (position - P < context)
            seed = tl.load(p_table + position // P - 1, mask=m_opens, other=-1)
            tl.store(p_seeds + start + o_token, seed, mask=m_token)
            if p_sink_rows is not None:
                slot = tl.where((position < SINKS) & (row >= 0), row * SINKS + position, -1)
                tl.store(p_sink_slots + start + o_token, slot, mask=m_token)
