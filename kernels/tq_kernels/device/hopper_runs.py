"""Device functions that find a program's next run on Hopper: the tokens that one launch brings to one page.

All warps look for themselves at the same slots, so that nobody waits. As in `runs.py`, tokens of a page stand
within page_tokens positions of each other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _page_of(slots, P: gl.constexpr):
    return gl.where(slots >= 0, slots // P, -1).to(gl.int32)


@gluon.jit
def _half_bits(offset, m_run, first_row, P: gl.constexpr):
    """Rows of half a page that a run has, as bits."""
    BITS: gl.constexpr = gl.int32 if P == 64 else gl.int64
    bit = offset - first_row
    m_half = m_run & (bit >= 0) & (bit < P // 2)
    return gl.sum(gl.where(m_half, gl.full_like(bit, 1).to(BITS) << gl.where(m_half, bit, 0).to(BITS), 0))


@gluon.jit
def look_around(p_slots, token, num_tokens, P: gl.constexpr, L_SLOTS: gl.constexpr):
    """The run of a token that may lead it.

    Returns:
        Its page; facts, in the bytes of an integer from the lowest: how many tokens it has, how many of these
        but the first do not follow their predecessor, the place of the one at offset 0, from 1, and the
        offset of the first; how many tokens before are of the page; and rows of both halves, as bits.
    """
    o_ahead = gl.arange(0, P, layout=L_SLOTS)
    slot = gl.load(p_slots + token)
    page = _page_of(slot, P)
    left = num_tokens - token
    slots = gl.load(p_slots + token + o_ahead, mask=o_ahead < left, other=-1)
    m_follower = (o_ahead > 0) & (o_ahead < left)
    previous = gl.load(p_slots + token + o_ahead - 1, mask=m_follower, other=-1)
    m_before = (o_ahead < token) & (o_ahead < P - 1)
    before = gl.load(p_slots + token - 1 - o_ahead, mask=m_before, other=-1)
    m_run = _page_of(slots, P) == page
    offset = (slots % P).to(gl.int32)
    m_astray = m_run & m_follower & ((previous + 1 != slots) | (offset == 0))
    facts = gl.where(m_run, 1, 0) + gl.where(m_astray, 1 << 8, 0)
    facts += gl.where(m_run & (offset == 0), (o_ahead + 1) << 16, 0)
    num_before = gl.sum(gl.where(_page_of(before, P) == page, 1, 0))
    low, high = _half_bits(offset, m_run, 0, P), _half_bits(offset, m_run, P // 2, P)
    return page, gl.sum(facts) | ((slot % P).to(gl.int32) << 24), num_before, low, high


@gluon.jit
def slots_of_window(p_slots, first, num_tokens, P: gl.constexpr, L_SLOTS: gl.constexpr):
    """Slots of a window as int32, which holds them; -1 beyond the tokens, and where first is negative."""
    SIZE: gl.constexpr = p_slots.dtype.element_ty.primitive_bitwidth // 32
    o_token = gl.arange(0, P, layout=L_SLOTS)
    m_token = (o_token < num_tokens - first) & (first >= 0)
    p_low = p_slots.to(gl.pointer_type(gl.int32)) + SIZE * first.to(gl.int64)
    return gl.load(p_low + SIZE * o_token, mask=m_token, other=-1)


@gluon.jit
def whole_page(slots, P: gl.constexpr):
    """The page that a window's slots are, all and in order; -1 if they are not."""
    first = gl.min(slots)
    o_token = gl.arange(0, P, layout=slots.type.layout)
    num_strays = gl.sum(gl.where(slots == first + o_token, 0, 1))
    return gl.where((num_strays == 0) & (first >= 0) & (first % P == 0), first // P, -1)


@gluon.jit
def next_run(p_slots, first, begin, num_tokens, P: gl.constexpr, L_SLOTS: gl.constexpr):
    """The first run whose leader stands in a window, at a place or after it.

    Returns:
        The leader's token, or -1; the place from which to go on, page_tokens if none is left; and page, facts
        and rows as `look_around` has them.
    """
    BITS: gl.constexpr = gl.int32 if P == 64 else gl.int64
    o_token = gl.arange(0, P, layout=L_SLOTS)
    m_token = o_token < num_tokens - first
    slots = gl.load(p_slots + first + o_token, mask=m_token, other=-1)
    token = first * 0 - 1
    page, facts = token, token
    low = token.to(BITS)
    high = low
    before = gl.load(p_slots + first + o_token - 1, mask=m_token & (first + o_token > 0), other=-1)
    pages = _page_of(slots, P)
    m_candidate = (pages >= 0) & (pages != _page_of(before, P))
    place = gl.min(gl.where(m_candidate & (o_token >= begin), o_token, P))
    while (place < P) & (token < 0):
        page, facts, num_before, low, high = look_around(p_slots, first + place, num_tokens, P, L_SLOTS)
        token = gl.where(num_before == 0, first + place, token)
        place = gl.min(gl.where(m_candidate & (o_token > place), o_token, P))
    return token, place, page, facts, low, high


@gluon.jit
def index_of_rows(p_slots, token, num_tokens, facts, row, P: gl.constexpr):
    """Place, from the run's leader on, of the token of every row of a page; -1 where the run has none."""
    count = facts & 0xFF
    index = row - (facts >> 24)
    index = gl.where((index >= 0) & (index < count), index, -1)
    if ((facts >> 8) & 0xFF) != 0:
        page = gl.load(p_slots + token) // P
        index = row * 0 - 1
        for i in range(P):
            slot = gl.load(p_slots + token + i, mask=i < num_tokens - token, other=-1)
            index = gl.where((slot // P == page) & (slot >= 0) & (slot % P == row), i, index)
    return index
