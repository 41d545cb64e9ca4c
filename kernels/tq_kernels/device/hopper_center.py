"""The centre of a page of rotated keys on Hopper: the mean of a run's rows, or what is stored.

Rows of a product lie in eight lanes of a warp, in two registers of each. To sum them, lanes exchange half of
their columns, then a quarter and an eighth; warps meet in shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tq_kernels.device.hopper_encode import nearest_float16
from tq_kernels.device.hopper_turns import ends_sum


@gluon.jit
def channels(layout: gl.constexpr, D: gl.constexpr):
    """Channel of every column of a product."""
    column = gl.arange(0, D, layout=layout)
    place = column // 8
    word = (column // 2) % 4 * (D // 32) + place // 4
    return (place // 2) % 2 * (D // 2) + word * 4 + place % 2 * 2 + column % 2


@gluon.jit
def _exchanged(x, LANE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums with a lane's partner, of the first half of the columns, or the second where the bit is set."""
    halves = gl.permute(gl.reshape(x, [ROWS, 8, 2, COLUMNS // 2]), (0, 1, 3, 2))
    first, second = gl.split(halves)
    kept, sent = gl.inline_asm_elementwise(
        f"""{{
        .reg .b32 t;
        .reg .pred p;
        mov.u32 t, %laneid;
        and.b32 t, t, {LANE};
        setp.ne.u32 p, t, 0;
        selp.b32 $0, $3, $2, p;
        selp.b32 $1, $2, $3, p;
        }}""",
        "=&r,=&r,r,r",
        [first, second],
        (gl.float32, gl.float32),
        True,
        1,
    )
    other = gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {LANE}, 31, -1;", "=r,r", [sent], gl.float32, False, 1
    )
    return kept + other


@gluon.jit
def _sum_of_rows(y, partial, L_SUM: gl.constexpr):
    """Sum over the first dimension; `partial` is shared memory of a row for every warp."""
    D: gl.constexpr = y.shape[1]
    WARPS: gl.constexpr = y.shape[0] // 16
    x = gl.permute(gl.reshape(y, [WARPS, 2, 8, D]), (0, 2, 3, 1))
    low, high = gl.split(x)
    x = _exchanged(low + high, 16, WARPS, D)
    x = _exchanged(x, 8, WARPS, D // 2)
    x = _exchanged(x, 4, WARPS, D // 4)
    partial.store(gl.reshape(x, [WARPS, D]))
    return gl.sum(partial.load(L_SUM), axis=0)


@gluon.jit
def _stored(
    p_pages,
    page_stride,
    p_seeds,
    token,
    page,
    facts,
    SHAPE: gl.constexpr,
    L_SUM: gl.constexpr,
):
    """The centre that is stored, whether the run takes it, and the place of the token that opens the page."""
    count, i_opening = facts & 0xFF, ((facts >> 16) & 0xFF) - 1
    is_stored = i_opening < 0
    o_channel = channels(gl.SliceLayout(0, L_SUM), SHAPE.head_dim)
    stored = (o_channel * 0).to(gl.float16)
    if count < SHAPE.page_tokens:
        source = page
        if p_seeds is not None:
            seed = gl.load(p_seeds + token + gl.maximum(i_opening, 0), mask=i_opening >= 0, other=-1)
            is_stored = is_stored | (seed >= 0)
            source = gl.where(seed >= 0, seed, page)
        p_stored = (p_pages + source.to(gl.int64) * page_stride + SHAPE.key_center).to(
            gl.pointer_type(gl.float16)
        )
        stored = gl.load(p_stored + o_channel, mask=is_stored & (o_channel >= 0), other=0.0)
    return stored, is_stored, i_opening


@gluon.jit
def sum_and_center(
    y,
    total,
    turn,
    partial,
    line,
    p_pages,
    page_stride,
    p_seeds,
    token,
    page,
    facts,
    SHAPE: gl.constexpr,
    L_SUM: gl.constexpr,
):
    """The sum of a run's rows and, from the turn on that ends it, -D times the float16 centre of its page.

    A run that opens the page writes the centre.

    Args:
        y: Rows ``[rows, D]`` float32 of a tile, zeros where the run has none.
        total: ``[D]`` float32, sum of the rows of the run's tile before.
        turn: As `hopper_turns` has them, one of those that sum rows.
        partial: Shared memory of a float32 row for every warp.
        line: Shared memory of a float32 row, for what is added to rows.
        p_pages: The head's section of page 0.
        page_stride: Bytes between pages.
        p_seeds: Page whose centre a page takes that a token opens, or -1; None if there are none.
        token: Of the run, the first.
        page: Of the run.
        facts: Of the run, as `hopper_runs.look_around` has them.
        SHAPE: Of the pages.
        L_SUM: How threads hold rows of all warps.

    Returns:
        The sum that the next turn takes.
    """
    stored, is_stored, i_opening = _stored(p_pages, page_stride, p_seeds, token, page, facts, SHAPE, L_SUM)
    total += _sum_of_rows(y, partial, L_SUM)
    if SHAPE.page_tokens == y.shape[0] or ends_sum(turn):
        mean = nearest_float16(total * (1.0 / ((facts & 0xFF) * SHAPE.head_dim).to(gl.float32)))
        center = gl.where(is_stored, stored, mean)
        p_center = p_pages + page.to(gl.int64) * page_stride + SHAPE.key_center
        o_channel = channels(gl.SliceLayout(0, L_SUM), SHAPE.head_dim)
        m_center = (i_opening >= 0) & (o_channel >= 0)
        gl.store(p_center.to(gl.pointer_type(gl.float16)) + o_channel, center, mask=m_center)
        line.store(center.to(gl.float32) * (-1.0 * SHAPE.head_dim))
        total = gl.zeros_like(total)
    return total
