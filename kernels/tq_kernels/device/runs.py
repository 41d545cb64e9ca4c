"""Device functions that find runs: the tokens that one launch brings to one page.

Tokens of a page stand within page_tokens positions of each other, so whoever looks that far behind a token
knows whether it leads its run, and whoever looks that far ahead knows all of the run. A page has at most 128
tokens, as `_page_shape.py` makes sure: counts of them are bytes.
"""

import triton
import triton.language as tl

from tq_kernels.device.write_planes import page_rows


@triton.jit
def page_of(slots, P: tl.constexpr):
    """Page of a slot, -1 of one to skip."""
    return tl.where(slots >= 0, slots // P, -1).to(tl.int32)


@triton.jit
def look_around(p_slots, i_token, page, num_tokens, P: tl.constexpr):
    """Tokens of the page around one that may be the first of them.

    Returns:
        Offset of each of the page_tokens tokens from this one on, -1 of those of other pages; and, in the
        bytes of an integer from the lowest: how many of them are of the page, how many of these but the first
        do not follow their predecessor in the page, the place of the one at offset 0, from 1, and how many of
        the page_tokens - 1 tokens before are of the page.
    """
    o_ahead = tl.arange(0, P)
    slots = tl.load(p_slots + i_token + o_ahead, mask=o_ahead < num_tokens - i_token, other=-1)
    m_follower = (o_ahead > 0) & (o_ahead < num_tokens - i_token)
    previous = tl.load(p_slots + i_token + o_ahead - 1, mask=m_follower, other=-1)
    m_before = (o_ahead < i_token) & (o_ahead < P - 1)
    before = tl.load(p_slots + i_token - 1 - o_ahead, mask=m_before, other=-1)
    m_run = page_of(slots, P) == page
    facts = tl.where(m_run, 1, 0)
    m_astray = m_follower & ((previous + 1 != slots) | (slots % P == 0))
    facts += tl.where(m_run & m_astray, 1 << 8, 0)
    facts += tl.where(m_run & (slots % P == 0), (o_ahead + 1) << 16, 0)
    facts += tl.where(page_of(before, P) == page, 1 << 24, 0)
    return tl.where(m_run, slots % P, -1).to(tl.int32), tl.sum(facts)


@triton.jit
def index_of_rows(b_offset, first_offset, facts, i_tile, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Place, from the run's leader on, of the token of every row of a tile; -1 where the run has none."""
    b_row = page_rows(i_tile, ROWS, SHAPE)
    if ((facts >> 8) & 0xFF) == 0:
        b_index = b_row - first_offset
        b_index = tl.where((b_index >= 0) & (b_index < (facts & 0xFF)), b_index, -1)
    else:
        o_ahead = tl.arange(0, SHAPE.page_tokens)
        b_index = tl.max(tl.where(b_offset[None, :] == b_row[:, None], o_ahead[None, :], -1), axis=1)
    return b_index
