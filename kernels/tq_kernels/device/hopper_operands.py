"""Packed words as tensor-core fragments, for the Hopper split kernel: loads, levels, operands, masks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.constexpr_function
def pick(items, i):
    """An item of a constant tuple, itself a constant."""
    return items[i]


@gluon.constexpr_function
def count(items):
    """Length of a constant tuple."""
    return len(items)


@gluon.jit
def share_start(i_share, num_shares, num_strips):
    """Where a share of strips begins, which is where the one before it ends: they differ by at most one."""
    return i_share * num_strips // num_shares


@gluon.jit
def wait_for_launch_before():
    """Wait until the launch before this one, and so all before that, has ended and can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def let_next_begin():
    """Let the next launch begin, if it was launched early; it waits for this one in its turn."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def log2(x):
    """Base-2 logarithm in one instruction."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def table(length, BYTES: gl.constexpr):
    """Level bytes of a code as the two registers that `_levels` wants.

    A constant operand of `prmt`, or one that all threads of a warp share, would be moved to a register each
    time; as the assembler sees it, these may differ by thread.
    """
    zero = gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %laneid; add.s32 t, t, $1; shr.s32 $0, t, 31; }",
        "=r,r",
        [length],
        gl.int32,
        True,
        1,
    )
    return zero ^ pick(BYTES, 0), zero ^ pick(BYTES, 1)


@gluon.jit
def spread(signs, CODE: gl.constexpr):
    """Sign words of LM3 with lanes 2 and 3 where bytes 2 and 3 want them."""
    if CODE == 3:
        return (signs.to(gl.int32) & 0xFFFF) * 0x100001
    else:
        return 0


@gluon.jit
def _levels(words, signs, tables, ASM: gl.constexpr):
    """float16 levels of a group: the words' shape and two dimensions more, (low, high) bit of the lane."""
    a, b, c, d = gl.inline_asm_elementwise(
        ASM,
        "=h,=h,=h,=h,r,r,r,r",
        [words, signs, tables[0], tables[1]],
        (gl.float16, gl.float16, gl.float16, gl.float16),
        True,
        1,
    )
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def key_operand(words, signs, tables, ASM: gl.constexpr, D: gl.constexpr, VEC: gl.constexpr):
    """Key words [16, words] to [16, D], channels in the order (group, word high, word low, h, c, e)."""
    GROUPS: gl.constexpr = count(ASM)
    HIGH: gl.constexpr = D // (16 * GROUPS * VEC)
    x = _levels(words, signs, tables, pick(ASM, 0))
    if GROUPS == 1:
        x = gl.permute(gl.reshape(x, [16, HIGH, 4, VEC, 2, 2]), (0, 1, 3, 5, 2, 4))
    elif GROUPS == 2:
        x = gl.join(x, _levels(words, signs, tables, pick(ASM, 1)))
        x = gl.permute(gl.reshape(x, [16, HIGH, 4, VEC, 2, 2, 2]), (0, 6, 1, 3, 5, 2, 4))
    else:
        y = gl.join(_levels(words, signs, tables, pick(ASM, 2)), _levels(words, signs, tables, pick(ASM, 3)))
        x = gl.join(gl.join(x, _levels(words, signs, tables, pick(ASM, 1))), y)
        x = gl.permute(gl.reshape(x, [16, HIGH, 4, VEC, 2, 2, 2, 2]), (0, 7, 6, 1, 3, 5, 2, 4))
    return gl.reshape(x, [16, D])


@gluon.jit
def value_operand(words, signs, tables, ASM: gl.constexpr, D: gl.constexpr):
    """A group of value words [4, D] to [D, 16]: channels in the order (high, low, r), tokens (h, c, e)."""
    x = gl.reshape(_levels(words, signs, tables, ASM), [4, D // 32, 8, 4, 2, 2])
    return gl.reshape(gl.permute(x, (1, 3, 2, 5, 0, 4)), [D, 16])


@gluon.jit
def transpose_sides(p, N: gl.constexpr, L_B: gl.constexpr):
    """Probabilities [16, N] from the layout of a product to that of a second operand."""
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], gl.float16, False, 2
    )
    x = gl.permute(gl.reshape(x, [2, 8, N // 8, 8]), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(x, [16, N]), L_B, assert_trivial=True)


@gluon.jit
def bits_of_both(a, b):
    """Combines a reduction by bitwise or."""
    return a | b


@gluon.jit
def load_keys(
    p_section,
    strip,
    o_keys,
    GROUPS: gl.constexpr,
    KW: gl.constexpr,
    RUN: gl.constexpr,
    WORDS: gl.constexpr,
    SIGNS: gl.constexpr,
):
    """Words and sign words of the keys of a strip, for every group of the values."""
    words = ()
    signs = ()
    p_words = p_section.to(gl.pointer_type(gl.int32)) + strip * (16 * KW)
    p_signs = p_section.to(gl.pointer_type(gl.int16)) + strip * (16 * KW)
    for g in gl.static_range(GROUPS):
        words = words + (gl.load(p_words + (WORDS // 4 + g * RUN * KW) + o_keys),)
        if SIGNS > 0:
            signs = signs + (gl.load(p_signs + (SIGNS // 2 + g * RUN * KW) + o_keys),)
        else:
            signs = signs + (0,)
    return words, signs


@gluon.jit
def load_values(
    p_section,
    strip,
    o_values,
    D: gl.constexpr,
    WORDS: gl.constexpr,
    SIGNS: gl.constexpr,
):
    """Words and sign words of the values of a strip."""
    p_words = p_section.to(gl.pointer_type(gl.int32)) + strip * (4 * D)
    words = gl.load(p_words + WORDS // 4 + o_values)
    signs = 0
    if SIGNS > 0:
        p_signs = p_section.to(gl.pointer_type(gl.int16)) + strip * (4 * D)
        signs = gl.load(p_signs + SIGNS // 2 + o_values)
    return words, signs


@gluon.jit
def load_scales(
    p_section,
    strip,
    o_scale,
    GROUPS: gl.constexpr,
    RUN: gl.constexpr,
    KEYS: gl.constexpr,
    VALUES: gl.constexpr,
):
    """Scales of the keys and of the values of a strip, those of two groups in a tensor of 32."""
    keys = ()
    values = ()
    p_scales = p_section.to(gl.pointer_type(gl.float16)) + strip * 16
    for g in gl.static_range(0, GROUPS, 2):
        keys = keys + (gl.load(p_scales + (KEYS // 2 + g * RUN) + o_scale),)
        values = values + (gl.load(p_scales + (VALUES // 2 + g * RUN) + o_scale),)
    return keys, values


@gluon.jit
def scales_of_rows(scales, o_token, G: gl.constexpr):
    """Scales of the tokens of group G: [16, 1] float32."""
    scales = gl.gather(scales[G // 2], o_token + G % 2 * 16, axis=0)
    return gl.expand_dims(scales.to(gl.float32), 1)


@gluon.jit
def load_centers(
    p_pages,
    p_table,
    page_stride,
    first_page,
    last_page,
    D: gl.constexpr,
    CENTER: gl.constexpr,
    L_CENTERS: gl.constexpr,
):
    """The centres of the keys of 16 pages, if there are so many: [16, D] float16."""
    o_page = first_page + gl.arange(0, 16, layout=gl.SliceLayout(1, L_CENTERS))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, L_CENTERS))
    m_page = o_page <= last_page
    page = gl.load(p_table + o_page, mask=m_page, other=0).to(gl.int64)
    p_centers = (p_pages + CENTER).to(gl.pointer_type(gl.float16)) + gl.expand_dims(
        page * (page_stride // 2), 1
    )
    return gl.load(p_centers + gl.expand_dims(o_d, 0), mask=gl.expand_dims(m_page, 1), other=0.0)


@gluon.jit
def scores_of_centers(
    b_centers,
    b_query,
    K_GROUPS: gl.constexpr,
    HIGH: gl.constexpr,
    VEC: gl.constexpr,
    D: gl.constexpr,
    N: gl.constexpr,
    L_A: gl.constexpr,
    L_ACC: gl.constexpr,
):
    """What the centres of 16 pages add to the scores of each: [16, N]."""
    x = gl.reshape(b_centers, [16, K_GROUPS, HIGH, 4, VEC, 2, 2])
    x = gl.reshape(gl.permute(x, (0, 1, 2, 4, 5, 3, 6)), [16, D])
    x = gl.convert_layout(x, L_A, assert_trivial=True)
    return mma_v2(x, b_query, gl.zeros([16, N], gl.float32, layout=L_ACC))


@gluon.jit
def row_of(x, row, N: gl.constexpr, L_ACC: gl.constexpr):
    """A row of a product [16, N], in place of every row."""
    x = gl.inline_asm_elementwise(
        """{
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        lop3.b32 lane, lane, 3, $2, 0xEA;
        shfl.sync.idx.b32 $0, $1, lane, 31, -1;
        }""",
        "=r,r,r",
        [x, (row & 7) << 2],
        gl.float32,
        False,
        1,
    )
    low, high = gl.split(gl.permute(gl.reshape(x, [2, 8, N]), (1, 2, 0)))
    x = gl.where(row < 8, low, high)
    x = gl.reshape(gl.permute(gl.join(x, x), (2, 0, 1)), [16, N])
    return gl.convert_layout(x, L_ACC, assert_trivial=True)


@gluon.jit
def seen(first_token, o_token, o_column, first, end, position, window, ROWS, GROUP, WINDOW):
    """Which tokens of a run each column sees: [16, 1], or [16, N] where columns are several query rows."""
    token = gl.expand_dims(first_token + o_token, 1)
    m_seen = (token >= first) & (token < end)
    if ROWS > 1:
        latest = gl.expand_dims(position - (ROWS - 1) + o_column // GROUP, 0)
        m_seen = m_seen & (token <= latest)
        if WINDOW:
            m_seen = m_seen & (token > latest - window)
    return m_seen
