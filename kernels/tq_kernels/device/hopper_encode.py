"""Packed words of rotated rows on Hopper, for LM4: the best of three cell sizes, four bits a channel.

Columns of a product are ordered so that a thread's results are whole words of keys. Magnitudes and squared
errors of a coordinate are one word of a table (`cells.py`), of which shared memory has copies for lanes to
differ in their banks. Bits are those of `encode.py` and `write_planes.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

from tq_kernels.device.hopper_operands import pick

_KEEP_NAN = gl.constexpr(PropagateNan.ALL)
"""So that the scale of a vector with a NaN is one, and not 0."""


@gluon.jit
def _select_bytes(low, high, SELECTOR: gl.constexpr):
    asm: gl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [low, high, SELECTOR], gl.int32, True, 1)


@gluon.jit
def _reciprocal_root(x):
    return gl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _root(x):
    """Square root and its reciprocal, of numbers far from the limits of float32."""
    reciprocal = _reciprocal_root(x)
    root = x * reciprocal
    root = gl.fma(gl.fma(-root, root, x), 0.5 * reciprocal, root)
    return root, gl.fma(gl.fma(-root, reciprocal, 1.0), reciprocal, reciprocal)


@gluon.jit
def nearest_float16(x):
    """Nearest float16, the largest one in place of infinity."""
    return gl.inline_asm_elementwise("cvt.rn.satfinite.f16.f32 $0, $1;", "=h,f", [x], gl.float16, True, 1)


@gluon.jit
def _split_eight(x):
    """``[..., 2, 2, 2]`` as eight tensors, in the order of their elements."""
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    a0, b0 = gl.split(x0)
    a1, b1 = gl.split(x1)
    a2, b2 = gl.split(x2)
    a3, b3 = gl.split(x3)
    return a0, a1, a2, a3, b0, b1, b2, b3


@gluon.jit
def _eight(x, ROWS: gl.constexpr, D: gl.constexpr):
    """Elements 0 to 3 of both groups of every word: tensors [ROWS, words]."""
    U: gl.constexpr = D // 32
    x = gl.permute(gl.reshape(x, [ROWS, U, 2, 2, 4, 2]), (0, 4, 1, 2, 3, 5))
    x = gl.reshape(x, [ROWS, 4 * U, 2, 2, 2])
    return _split_eight(x)


@gluon.jit
def _place_of_best(found, ROWS: gl.constexpr, D: gl.constexpr):
    """Bit at which the magnitudes of the size of least error begin in words of the table, for every row."""
    sums = gl.sum(gl.sum(gl.reshape(found, [ROWS, D // 64, 8, 4, 2]), axis=4), axis=2)
    near = gl.inline_asm_elementwise("bfe.s32 $0, $1, 0, 11;", "=r,r", [sums], gl.int32, True, 1)
    far = ((sums - near) << 10) >> 21
    both = gl.sum(gl.sum(near + (far << 16), axis=1), axis=1)
    near = (both << 16) >> 16
    far = (both - near) >> 16
    return gl.where(far < gl.minimum(near, 0), 28, gl.where(near < 0, 25, 22))


@gluon.jit
def encode(y, address, levels, CODE: gl.constexpr):
    """Packed words of vectors, and their scales.

    Args:
        y: ``[rows, head_dim]`` float32 rotated vectors, head_dim times too long, columns as the product has.
        address: Where a lane's copy of the table is in shared memory.
        levels: In quarters, four a number.
        CODE: As the kernel has it.

    Returns:
        ``[rows, head_dim / 8]`` int32, and ``[rows]`` float16.
    """
    ROWS: gl.constexpr = y.shape[0]
    D: gl.constexpr = y.shape[1]
    # several chains of additions of a thread, which do not wait for each other
    squares = gl.sum(gl.reshape(y * y, [ROWS, 2, D // 16, 4, 2]), axis=2)
    squares = gl.sum(gl.sum(gl.sum(squares, axis=3), axis=1), axis=1)
    squares = gl.convert_layout(squares, gl.SliceLayout(1, y.type.layout), assert_trivial=True)
    squares = gl.maximum(squares, 2.0**-100, propagate_nan=_KEEP_NAN)
    squares = gl.minimum(squares, 2.0**126, propagate_nan=_KEEP_NAN)
    norm, reciprocal = _root(squares)
    factor = gl.expand_dims(reciprocal * (pick(CODE, 0) * D**0.5 / pick(CODE, 1) * 255 * 2.0**-24), 1)
    found = gl.inline_asm_elementwise(pick(CODE, 3), "=r,f,f,r", [y, factor, address], gl.int32, True, 1)
    y0, y1, y2, y3, z0, z1, z2, z3 = _eight(y.to(gl.int32, bitcast=True), ROWS, D)
    a0, a1, a2, a3, b0, b1, b2, b3 = _eight(found, ROWS, D)
    L: gl.constexpr = gl.SliceLayout(1, a0.type.layout)
    place = gl.convert_layout(_place_of_best(found, ROWS, D), L)
    mask = 0x00070007 << (place - 16)
    turned = (mask << 8) | ((mask >> 24) & 0xFF)
    words, lengths = gl.inline_asm_elementwise(
        pick(CODE, 4),
        "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            a0, a1, a2, a3, b0, b1, b2, b3, y0, y1, y2, y3, z0, z1, z2, z3,
            gl.expand_dims(mask, 1), gl.expand_dims(turned, 1), gl.expand_dims(place - 16, 1),
            levels[0], levels[1],
        ],
        (gl.int32, gl.int32),
        True,
        1,
    )  # fmt: skip
    length, reciprocal = _root(gl.sum(lengths, axis=1).to(gl.float32))
    norm = gl.convert_layout(norm, length.type.layout) * (4.0 / D)
    scale = norm * reciprocal
    scale = gl.fma(gl.fma(-scale, length, norm), reciprocal, scale)
    return words, nearest_float16(scale)


@gluon.jit
def words_of_tokens(x, P: gl.constexpr, W: gl.constexpr):
    """Words of eight channels of a token as words of eight tokens of a channel.

    Args:
        x: ``[P, W]`` int32, rows as `hopper_planes.token_of_row` has them.
        P: Tokens of a page.
        W: Words of a token.

    Returns:
        ``[P / 8, 4 * W]`` int32 of the first half of the channels, and of the second.
    """
    x = gl.permute(gl.reshape(x, [P // 16, 2, 2, 2, 2, W]), (0, 2, 5, 1, 3, 4))
    x = gl.reshape(x, [P // 8, W, 2, 2, 2])
    a0, a1, a2, a3, b0, b1, b2, b3 = _split_eight(x)
    # magnitudes and signs of a word stand in different orders
    n0, n1 = _nibbles_of_two(_merge(a0, b0), _merge(a1, a0))
    n2, n3 = _nibbles_of_two(_merge(a2, b1), _merge(a3, a1))
    n4, n5 = _nibbles_of_two(_merge(b0, b2), _merge(b1, a2))
    n6, n7 = _nibbles_of_two(_merge(b2, b3), _merge(b3, a3))
    x0, x2, x4, x6 = _bytes_of_four(n0, n2, n4, n6)
    x1, x3, x5, x7 = _bytes_of_four(n1, n3, n5, n7)
    a = _side_by_side(_merge(x0, x1), _merge(x1, x3), _merge(x2, x5), _merge(x3, x7), P // 8, W)
    b = _side_by_side(_merge(x4, x0), _merge(x5, x2), _merge(x6, x4), _merge(x7, x6), P // 8, W)
    return a, b


@gluon.jit
def _merge(magnitudes, signs):
    return (magnitudes & 0x77777777) | (signs & -0x77777778)


@gluon.jit
def _nibbles_of_two(x, y):
    """Even nibbles of both, and odd nibbles of both, those of the first in front."""
    even = (x & 0x0F0F0F0F) | ((y << 4) & -0x0F0F0F10)
    odd = ((x >> 4) & 0x0F0F0F0F) | (y & -0x0F0F0F10)
    return even, odd


@gluon.jit
def _bytes_of_four(x0, x1, x2, x3):
    """Byte j of word i to byte i of word j."""
    a, b = _select_bytes(x0, x1, 0x5140), _select_bytes(x0, x1, 0x7362)
    c, d = _select_bytes(x2, x3, 0x5140), _select_bytes(x2, x3, 0x7362)
    y0, y1 = _select_bytes(a, c, 0x5410), _select_bytes(a, c, 0x7632)
    return y0, y1, _select_bytes(b, d, 0x5410), _select_bytes(b, d, 0x7632)


@gluon.jit
def _side_by_side(x0, x1, x2, x3, R: gl.constexpr, W: gl.constexpr):
    return gl.reshape(gl.join(gl.join(x0, x2), gl.join(x1, x3)), [R, 4 * W])
