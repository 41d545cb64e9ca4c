"""The turns of a run on Hopper: its tiles of 64 rows, those of keys first, as bits of a set.

The centre of a page of two tiles needs the keys of both. So the first is summed, the second is summed and
packed, and the first comes again to be packed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE_ROWS = gl.constexpr(64)
"""What one product of a warpgroup has."""
_SUM_FIRST = gl.constexpr(1)
_SECOND = gl.constexpr(2)
_FIRST_ALONE = gl.constexpr(4)
_FIRST = gl.constexpr(8)
_FIRST_VALUES = gl.constexpr(16)
_SECOND_VALUES = gl.constexpr(32)
OF_KEYS = gl.constexpr(15)
OF_VALUES = gl.constexpr(48)


@gluon.jit
def turns_of_run(facts, low, high, SHAPE: gl.constexpr):
    """Turns of a run, which packs the tiles that it has rows of.

    Only a run that opens a page, and so may give it its centre, has to sum all rows before it packs any.
    """
    if SHAPE.page_tokens == TILE_ROWS:
        turns = facts * 0 + (_FIRST_ALONE | _FIRST_VALUES)
    else:
        rows = low | high
        has_first, has_second = rows.to(gl.int32) != 0, (rows >> 32).to(gl.int32) != 0
        turns = gl.where(has_first, _FIRST_VALUES, 0) | gl.where(has_second, _SECOND | _SECOND_VALUES, 0)
        if SHAPE.centered:
            is_opening = (facts & 0xFF0000) != 0
            first = gl.where(is_opening, _SUM_FIRST | _FIRST, _FIRST)
            turns |= gl.where(has_first, gl.where(has_second, first, _FIRST_ALONE), 0)
        else:
            turns |= gl.where(has_first, _FIRST, 0)
        # the compiler must know that lanes agree, or it prepares for those that go different ways
        asm: gl.constexpr = "redux.sync.or.b32 $0, $1, -1;"
        turns = gl.inline_asm_elementwise(asm, "=r,r", [turns], gl.int32, False, 1)
    return turns


@gluon.jit
def is_of_keys(turns):
    """Whether the next of the turns is one of keys."""
    return (turns & OF_KEYS) != 0


@gluon.jit
def next_of(turns):
    """The next of the turns, alone."""
    return turns & -turns


@gluon.jit
def tile_of(turns, SHAPE: gl.constexpr):
    """Which of the tiles of a page the next of the turns is of."""
    if SHAPE.page_tokens == TILE_ROWS:
        return 0
    else:
        return ((next_of(turns) & (_SECOND | _SECOND_VALUES)) != 0).to(gl.int32)


@gluon.jit
def sums(turn):
    """Whether a turn sums rows."""
    return (turn & (_SUM_FIRST | _SECOND | _FIRST_ALONE)) != 0


@gluon.jit
def ends_sum(turn):
    """Whether a turn has the sum of all rows of a page, and so its centre."""
    return (turn & (_SECOND | _FIRST_ALONE)) != 0


@gluon.jit
def packs(turn):
    """Whether a turn packs rows."""
    return turn != _SUM_FIRST
