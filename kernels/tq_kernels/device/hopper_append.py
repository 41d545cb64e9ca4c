"""The newest token of a sequence into its page, a warp for each token and KV head: nothing passes memory.

Written for decode steps, in which no two tokens share a page. The rotation is that of `hopper_columns.py`;
levels, scales and bits are those of `cell_sizes.py`, `encode.py` and `write_planes.py`, a channel at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tq_kernels.cells import NUM_STEPS
from tq_kernels.device.cell_sizes import STEP
from tq_kernels.device.hopper_columns import _hadamard
from tq_kernels.device.hopper_operands import count, let_next_begin, pick, wait_for_launch_before

_NUM_STEPS = gl.constexpr(NUM_STEPS)


@gluon.jit
def _root(x):
    return gl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _quotient(x, y):
    return gl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], gl.float32, True, 1)


@gluon.jit
def _float16(x):
    """Nearest float16, the largest one in place of infinity."""
    return gl.inline_asm_elementwise("cvt.rn.satfinite.f16.f32 $0, $1;", "=h,f", [x], gl.float16, True, 1)


@gluon.jit
def _rotated(x, p_signs, o_d, D: gl.constexpr, L_ROW: gl.constexpr):
    """head_dim times the rotation of a vector."""
    L: gl.constexpr = gl.SliceLayout(0, L_ROW)
    x = _hadamard(gl.expand_dims(x * gl.load(p_signs + o_d), 0), 1, D, L_ROW)
    x = _hadamard(x * gl.expand_dims(gl.load(p_signs + D + o_d), 0), 1, D, L_ROW)
    return gl.convert_layout(gl.reshape(x, [D]), L, assert_trivial=True)


@gluon.jit
def _step(y, factor):
    """Steps of sizes, factor being that which brings the end of their range to one."""
    return gl.inline_asm_elementwise(STEP, "=r,f,f", [y, factor], gl.int32, True, 1) & 0xFF


@gluon.jit
def _encoded(y, p_cells, D: gl.constexpr, SIDE: gl.constexpr, GAIN: gl.constexpr):
    """Signs, indices and scale of a vector that is head_dim times too long, at the cell size of least error.

    Its scale is GAIN times as large where the vector is less like its levels than SIDE says.
    """
    LEVELS: gl.constexpr = pick(SIDE, 4)
    norm = _root(gl.sum(y * y, axis=0))
    factor = _inverse(gl.maximum(norm, 1e-30 * D)) * pick(SIDE, 2)
    step = _step(y, gl.zeros_like(y) + factor)
    word = gl.load(p_cells + step)
    near = ((word & 0x7FF) ^ 0x400) - 0x400
    far = ((((word - near) >> 11) & 0x7FF) ^ 0x400) - 0x400
    both = gl.sum(near + (far << 16), axis=0)
    near = ((both & 0xFFFF) ^ 0x8000) - 0x8000
    far = (both - near) >> 16
    shift = gl.where(far < gl.minimum(near, 0), 28, gl.where(near < 0, 25, 22))
    index = (word >> shift) & 7
    level = index * 0 + pick(LEVELS, 0)
    for i in gl.static_range(1, count(LEVELS)):
        level = gl.where(index >= i, pick(LEVELS, i), level)
    squares = gl.sum(level * level, axis=0)
    length = _root(squares.to(gl.float32)) * 0.25
    scale = _quotient(norm * (1.0 / D), gl.maximum(length, 1e-30))
    if GAIN != 1.0:
        product = gl.sum(level * (2 * step + 1), axis=0).to(gl.float32)
        likeness = _quotient(product * product, squares.to(gl.float32))
        scale = gl.where(likeness < pick(SIDE, 3), scale * GAIN, scale)
    return (y.to(gl.int32, bitcast=True) >> 31) & 1, index, _float16(scale)


@gluon.jit
def _placed(sign, index, group, lane, CODE: gl.constexpr):
    """Magnitudes and signs where a word, and a word of signs, has them."""
    if CODE == 4:
        return (index << (16 * group + 4 * lane)) | (sign << (7 - 4 * group + 8 * lane)), sign
    elif CODE == 3:
        place = 7 + 8 * (lane & 1) - 4 * (lane >> 1)
        word = index << (2 * (group & 1) + 16 * (group >> 1) + 4 * lane)
        return word, sign << (place - group)
    else:
        return (index << (group + 8 * lane)) | (sign << (7 - group + 8 * lane)), sign


@gluon.jit
def _store_key(
    p_section, sign, index, offset, o_d, CODE: gl.constexpr, GROUPS: gl.constexpr, SHAPE: gl.constexpr
):
    """A row of key words, and of sign words: bits of a word lie in as many channels as it holds."""
    WORDS: gl.constexpr = SHAPE.head_dim // (4 * GROUPS)
    word, signs = _placed(sign, index, o_d // (4 * WORDS), o_d % 4, CODE)
    word = gl.sum(gl.sum(gl.reshape(word, [GROUPS, WORDS, 4]), axis=2), axis=0)
    o_word = offset * WORDS + gl.arange(0, WORDS, layout=word.type.layout)
    gl.store((p_section + SHAPE.key_words).to(gl.pointer_type(gl.int32)) + o_word, word)
    if CODE == 3:
        signs = gl.sum(gl.sum(gl.reshape(signs, [GROUPS, WORDS, 4]), axis=2), axis=0)
        p_signs = (p_section + SHAPE.key_signs).to(gl.pointer_type(gl.int16))
        gl.store(p_signs + o_word, signs.to(gl.int16))


@gluon.jit
def _store_value(
    p_section, sign, index, offset, o_d, CODE: gl.constexpr, GROUPS: gl.constexpr, SHAPE: gl.constexpr
):
    """The bits of a token in the words of its values, which it shares with other tokens of the page."""
    RUN: gl.constexpr = SHAPE.page_tokens // GROUPS
    MOST: gl.constexpr = (1 << (CODE - 1)) - 1
    group, lane = offset // RUN, offset % 4
    word, signs = _placed(sign, index, group, lane, CODE)
    held, held_signs = _placed(offset * 0 + 1, offset * 0 + MOST, group, lane, CODE)
    o_word = (offset % RUN) // 4 * SHAPE.head_dim + o_d
    p_words = (p_section + SHAPE.value_words).to(gl.pointer_type(gl.int32)) + o_word
    gl.store(p_words, (gl.load(p_words) & (held ^ -1)) | word)
    if CODE == 3:
        p_signs = (p_section + SHAPE.value_signs).to(gl.pointer_type(gl.int16)) + o_word
        gl.store(p_signs, ((gl.load(p_signs).to(gl.int32) & (held_signs ^ -1)) | signs).to(gl.int16))


@gluon.jit
def _centered(y, p_head, p_section, p_seeds, i_token, offset, page_stride, o_d, SHAPE: gl.constexpr):
    """A rotated key less head_dim times the centre of its page, which the first token of a page sets."""
    D: gl.constexpr = SHAPE.head_dim
    p_center = (p_section + SHAPE.key_center).to(gl.pointer_type(gl.float16)) + o_d
    if offset == 0:
        center = _float16(y * (1.0 / D))
        if p_seeds is not None:
            seed = gl.load(p_seeds + i_token)
            p_seed = p_head + gl.maximum(seed, 0).to(gl.int64) * page_stride + SHAPE.key_center
            seeded = gl.load(p_seed.to(gl.pointer_type(gl.float16)) + o_d)
            center = gl.where(seed >= 0, seeded, center)
        gl.store(p_center, center)
    else:
        center = gl.load(p_center)
    return gl.fma(center.to(gl.float32), gl.full_like(y, -1.0 * D), y)


@gluon.jit
def append_tokens(
    p_keys,
    p_values,
    p_slots,
    p_seeds,
    p_balance,
    p_signs,
    p_cells,
    p_pages,
    p_sink_slots,
    p_sink_keys,
    p_sink_values,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    sink_token_stride,
    sink_head_stride,
    SHAPE: gl.constexpr,
    KEY: gl.constexpr,
    VALUE: gl.constexpr,
    VALUE_GAIN: gl.constexpr,
):
    """Grid (KV heads, tokens, keys and values), so that neither side waits for the other.

    KEY and VALUE are (code, groups, what brings the range of sizes to one, likeness without
    gain, levels in quarters).
    """
    D: gl.constexpr = SHAPE.head_dim
    P: gl.constexpr = SHAPE.page_tokens
    L_ROW: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [1, 1], [1, 0])
    L_TAIL: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i_head = gl.program_id(0).to(gl.int64)
    i_token = gl.program_id(1).to(gl.int64)
    is_key = gl.program_id(2) == 0
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, L_ROW))
    p_head = p_pages + i_head * SHAPE.section_bytes
    o_sink = i_head * sink_head_stride + o_d
    wait_for_launch_before()
    let_next_begin()
    slot = gl.load(p_slots + i_token)
    page, offset = (slot // P).to(gl.int64), (slot % P).to(gl.int32)
    p_section = p_head + page * page_stride
    sink_slot = slot.to(gl.int64) * 0 - 1
    if p_sink_slots is not None:
        sink_slot = gl.load(p_sink_slots + i_token).to(gl.int64)
    if is_key:
        raw = gl.load(p_keys + i_token * key_token_stride + i_head * key_head_stride + o_d)
        if p_sink_slots is not None:
            if sink_slot >= 0:
                p_kept = p_sink_keys + sink_slot * sink_token_stride + o_sink
                gl.store(p_kept, raw.to(p_sink_keys.dtype.element_ty))
        if slot >= 0:
            x = raw.to(gl.float32)
            if p_balance is not None:
                x = x * _inverse(gl.load(p_balance + i_head * D + o_d))
            y = _rotated(x, p_signs, o_d, D, L_ROW)
            if SHAPE.centered:
                y = _centered(y, p_head, p_section, p_seeds, i_token, offset, page_stride, o_d, SHAPE)
            if SHAPE.section_bytes > SHAPE.used_bytes:
                if offset == 0:
                    o_tail = SHAPE.used_bytes // 4 + gl.arange(0, SHAPE.tail_tile, layout=L_TAIL)
                    p_tail = p_section.to(gl.pointer_type(gl.int32)) + o_tail
                    gl.store(p_tail, o_tail * 0, mask=o_tail < SHAPE.section_bytes // 4)
            sign, index, scale = _encoded(y, p_cells, D, KEY, 1.0)
            _store_key(p_section, sign, index, offset, o_d, pick(KEY, 0), pick(KEY, 1), SHAPE)
            gl.store((p_section + SHAPE.key_scales).to(gl.pointer_type(gl.float16)) + offset, scale)
    else:
        raw = gl.load(p_values + i_token * value_token_stride + i_head * value_head_stride + o_d)
        if p_sink_slots is not None:
            if sink_slot >= 0:
                p_kept = p_sink_values + sink_slot * sink_token_stride + o_sink
                gl.store(p_kept, raw.to(p_sink_values.dtype.element_ty))
        if slot >= 0:
            y = _rotated(raw.to(gl.float32), p_signs, o_d, D, L_ROW)
            sign, index, scale = _encoded(y, p_cells + _NUM_STEPS, D, VALUE, VALUE_GAIN)
            _store_value(p_section, sign, index, offset, o_d, pick(VALUE, 0), pick(VALUE, 1), SHAPE)
            gl.store((p_section + SHAPE.value_scales).to(gl.pointer_type(gl.float16)) + offset, scale)
