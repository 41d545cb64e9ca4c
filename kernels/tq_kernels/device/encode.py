"""Device functions from rotated coordinates to indices and scales, four neighbouring channels at a time.

A quad is four neighbouring channels of one token. Its magnitudes are the nibbles of bytes 0 and 2 of a word,
its signs bit 7 of the four bytes of another; bytes of E4M3_SCALED are one word. On NVIDIA two float16 at a
time look for their boundaries, and levels are squared four at a time; plain float32 gives the same bits.
"""

import re
import struct

import triton
import triton.language as tl

from tq_kernels.codebook import BOUNDARIES, GAIN_LIKENESS, LEVELS, TARGETS, VALUE_GAINS
from tq_kernels.device.pack import four


def _quarters(bits: int, first: int) -> int:
    """Four levels, in quarters, as the bytes of a signed integer, the lowest level in the lowest byte."""
    quarters = [int(4 * level) for level in LEVELS[bits][first : first + 4]]
    return int.from_bytes(bytes(quarters).ljust(4, b"\0"), "little", signed=True)


def _twice(number: float) -> int:
    """Two float16 of the number, which must be exact, in 32 bits."""
    half = int.from_bytes(struct.pack("<e", number), "little")
    if struct.unpack("<e", struct.pack("<e", number))[0] != number:
        raise ValueError(f"{number} is no float16")
    return half * 0x10001


def _assembly(template: str) -> str:
    """Assembly with every ``<number>`` as a register that holds two float16 of it."""
    numbers = sorted(set(re.findall(r"<(.*?)>", template)))
    for i, number in enumerate(numbers):
        template = template.replace(f"<{number}>", f"c{i}")
    constants = "".join(f"mov.b32 c{i}, {_twice(float(number))}; " for i, number in enumerate(numbers))
    return f"{{ .reg .b32 x, y, z, h, m, e, p, q, c<{len(numbers)}>; {constants}{template} }}"


def _search(edges: tuple[float, ...]) -> str:
    """Assembly that finds the magnitudes of the two float16 of x, as two float16 in y."""
    if len(edges) == 7:
        return f"""
        set.ge.f16x2.f16x2 h, x, <{edges[3]}>;
        fma.rn.f16x2 e, h, <{edges[5] - edges[1]}>, <{edges[1]}>;
        set.ge.f16x2.f16x2 m, x, e;
        fma.rn.f16x2 e, h, <{edges[4] - edges[0]}>, <{edges[0]}>;
        fma.rn.f16x2 y, h, <{edges[6] - edges[4] - edges[2] + edges[0]}>, <{edges[2] - edges[0]}>;
        fma.rn.f16x2 e, m, y, e;
        set.ge.f16x2.f16x2 y, x, e;
        fma.rn.f16x2 y, m, <2.0>, y;
        fma.rn.f16x2 y, h, <4.0>, y;"""
    if len(edges) == 3:
        return f"""
        set.ge.f16x2.f16x2 h, x, <{edges[1]}>;
        fma.rn.f16x2 e, h, <{edges[2] - edges[0]}>, <{edges[0]}>;
        set.ge.f16x2.f16x2 y, x, e;
        fma.rn.f16x2 y, h, <2.0>, y;"""
    return f"set.ge.f16x2.f16x2 y, x, <{edges[0]}>;"


def _nibbles_asm(edges: tuple[float, ...]) -> str:
    """Assembly from two pairs of sizes to their magnitudes, as nibbles of bytes 0 and 2 of a word."""
    return _assembly(
        f"""
        mov.b32 x, $2;
        {_search(edges)}
        fma.rn.f16x2 z, y, <16.0>, <1024.0>;
        mov.b32 x, $1;
        {_search(edges)}
        add.rn.f16x2 $0, y, z;"""
    )


_SMALLEST_NORM = tl.constexpr(1e-30)
_TARGETS = tl.constexpr(tuple(TARGETS.get(bits, 0.0) for bits in range(9)))
_VALUE_GAINS = tl.constexpr(tuple(VALUE_GAINS.get(bits, 1.0) for bits in range(9)))
_GAIN_LIKENESS = tl.constexpr(GAIN_LIKENESS)
_ALL_EDGES = tl.constexpr(BOUNDARIES)
_ALL_NIBBLES = tl.constexpr({code: tuple(map(_nibbles_asm, sets)) for code, sets in BOUNDARIES.items()})
_LM2_LEVELS = tl.constexpr(_quarters(2, 0))
_LM3_LEVELS = tl.constexpr(_quarters(3, 0))
_LM4_LOW_LEVELS = tl.constexpr(_quarters(4, 0))
_LM4_HIGH_LEVELS = tl.constexpr(_quarters(4, 4))
_SMALLEST_SQUARES = tl.constexpr((0, 0, *(int(4 * LEVELS[bits][0]) ** 2 for bits in (2, 3, 4))))
"""Squares of the smallest levels, in sixteenths, by bits."""
_SQUARES = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $3, $3, 0x20; prmt.b32 t, $4, $5, t;"
    " dp4a.u32.u32 $0, t, t, 0; dp4a.u32.u32 $1, t, $2, 0; }"
)
_SIZES = tl.constexpr(
    _assembly(
        """
        cvt.rz.f16x2.f32 p, $6, $4;
        cvt.rz.f16x2.f32 q, $7, $5;
        prmt.b32 $2, p, q, 0x7351;
        abs.f16x2 p, p;
        abs.f16x2 q, q;
        mov.b32 $0, p;
        mov.b32 $1, q;
        min.f16x2 x, p, <127.5>;
        min.f16x2 y, q, <127.5>;
        fma.rn.f16x2 x, x, <2.0>, <1024.0>;
        fma.rn.f16x2 y, y, <2.0>, <1024.0>;
        prmt.b32 $3, x, y, 0x6240;"""
    )
)
_FP16_MAX = tl.constexpr(65504.0)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_E4M3_SUBNORMAL = tl.constexpr(2.0**14)
"""A float whose last place is the spacing of e4m3 numbers below the smallest normal one."""


@triton.constexpr_function
def _edges(code, index):
    """One of a code's sets of boundaries."""
    return _ALL_EDGES[code][index]


@triton.constexpr_function
def _num_sets(code):
    return len(_ALL_EDGES[code])


@triton.constexpr_function
def _nibbles_assembly(code, index):
    return _ALL_NIBBLES[code][index]


@triton.jit
def _magnitudes(size, EDGES: tl.constexpr):
    """Index of the nearest positive level, as a float; a size on a boundary takes the upper level.

    A binary search whose boundaries are computed: a multiply-add costs a GPU less than a select.
    """
    if len(EDGES) == 7:
        high = (size >= EDGES[3]).to(tl.float32)
        middle = (size >= EDGES[1] + high * (EDGES[5] - EDGES[1])).to(tl.float32)
        edge = (EDGES[0] + high * (EDGES[4] - EDGES[0])) + middle * (
            (EDGES[2] - EDGES[0]) + high * (EDGES[6] - EDGES[4] - EDGES[2] + EDGES[0])
        )
        index = high * 4 + (middle * 2 + (size >= edge).to(tl.float32))
    elif len(EDGES) == 3:
        high = (size >= EDGES[1]).to(tl.float32)
        edge = EDGES[0] + high * (EDGES[2] - EDGES[0])
        index = high * 2 + (size >= edge).to(tl.float32)
    else:
        index = (size >= EDGES[0]).to(tl.float32)
    return index


@triton.jit
def _truncated(x):
    """Size of x as a float32 that a float16 holds, and its bits as that float16."""
    size = (x.to(tl.uint32, bitcast=True) & 0x7FFFE000).to(tl.float32, bitcast=True)
    return size, size.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _halves(size):
    """Nearest number of halves, at most 127, of sizes that a float16 holds."""
    return (tl.minimum(size, 127.5) * 2 + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF


@triton.jit
def _quad_sizes(x0, x1, x2, x3, PTX: tl.constexpr):
    """Four channels made ready for a search.

    Boundaries are float16 numbers, so truncation to float16 moves no number across one, and two channels go
    through every instruction together.

    Returns:
        Sizes of channels 0 and 2 as two float16 in a word, of 1 and 3 likewise, bytes whose bit 7 is the sign
        (other bits mean nothing), and sizes in halves as four bytes.
    """
    if PTX:
        even, odd, signs, halves = tl.inline_asm_elementwise(
            _SIZES,
            "=&r,=&r,=&r,=&r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        z0, h0 = _truncated(x0)
        z1, h1 = _truncated(x1)
        z2, h2 = _truncated(x2)
        z3, h3 = _truncated(x3)
        even, odd = h0 | (h2 << 16), h1 | (h3 << 16)
        halves = (_halves(z0) | (_halves(z1) << 8)) | ((_halves(z2) | (_halves(z3) << 8)) << 16)
        s0, s1 = x0.to(tl.uint32, bitcast=True), x1.to(tl.uint32, bitcast=True)
        s2, s3 = x2.to(tl.uint32, bitcast=True), x3.to(tl.uint32, bitcast=True)
        signs = (s0 >> 24) | ((s1 >> 24) << 8) | ((s2 >> 24) << 16) | ((s3 >> 24) << 24)
    return even, odd, signs, halves


@triton.jit
def _half_of(word, SHIFT: tl.constexpr):
    """One of the two float16 in a word, as float32."""
    return ((word >> SHIFT) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _quad_nibbles(even, odd, CODE: tl.constexpr, SET: tl.constexpr, PTX: tl.constexpr):
    """Magnitudes of four channels between one set of boundaries, as nibbles of bytes 0 and 2."""
    if PTX:
        asm: tl.constexpr = _nibbles_assembly(CODE, SET)
        nibbles = tl.inline_asm_elementwise(
            asm, "=&r,r,r", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        edges: tl.constexpr = _edges(CODE, SET)
        low = _magnitudes(_half_of(even, 0), edges) + _magnitudes(_half_of(odd, 0), edges) * 16
        high = _magnitudes(_half_of(even, 16), edges) + _magnitudes(_half_of(odd, 16), edges) * 16
        # the other bytes as the assembly leaves them, so that nothing comes to rely on zeros there
        nibbles = low.to(tl.uint32) | (high.to(tl.uint32) << 16) | 0x64006400
    return nibbles


@triton.jit
def level_tables(zero, CODE: tl.constexpr):
    """Levels in quarters as eight bytes, in two words.

    NVIDIA's assembler, not knowing that zero is 0, keeps them in registers; it would move constants there
    again for every selection.
    """
    if CODE == 4:
        low, high = zero ^ _LM4_LOW_LEVELS, zero ^ _LM4_HIGH_LEVELS
    elif CODE == 3:
        low, high = zero ^ _LM3_LEVELS, zero
    else:
        low, high = zero ^ _LM2_LEVELS, zero
    return low, high


@triton.jit
def _quad_sums(nibbles, halves, tables, PTX: tl.constexpr):
    """Of four channels, the sum of the levels' squares in sixteenths, and of size times level in eighths."""
    if PTX:
        squares, products = tl.inline_asm_elementwise(
            _SQUARES,
            "=&r,=&r,r,r,r,r",
            [halves, nibbles, tables[0], tables[1]],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        squares = (nibbles * 0).to(tl.int32)
        products = squares
        for channel in tl.static_range(4):
            index = (nibbles >> (4 * channel + 8 * (channel // 2))).to(tl.int32)
            levels = tl.where((index & 4) == 0, tables[0], tables[1])
            level = (levels >> (8 * (index & 3))) & 0xFF
            squares += level * level
            products += level * ((halves >> (8 * channel)) & 0xFF).to(tl.int32)
    return squares, products


@triton.jit
def _likeness(squares, products):
    """Grows with the cosine of sizes and levels; sums are whole numbers, so all machines agree on it."""
    product = products.to(tl.float32)
    return tl.div_rn(product * product, squares.to(tl.float32))


@triton.jit
def e4m3_bytes(x, PTX: tl.constexpr):
    """Bytes 0 to 255, as int32, of the saturating cast to e4m3, to nearest, ties to even."""
    x = tl.minimum(tl.maximum(x, -_E4M3_MAX), _E4M3_MAX)
    if PTX:
        byte = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        size = tl.abs(x)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (size + _E4M3_SUBNORMAL).to(tl.int32, bitcast=True) & 0xFF
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        byte = tl.where(size < _E4M3_SMALLEST_NORMAL, subnormal, normal) | sign
    return byte


@triton.jit
def _e4m3_squares(byte, PTX: tl.constexpr):
    """Squares, float32, of the numbers that e4m3 bytes stand for."""
    if PTX:
        level = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # the seven low bits of e4m3, moved up by seven, are a float16 that is 1/256 of the value
        level = ((byte & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    return level * level


@triton.jit
def saturated_float16(x, PTX: tl.constexpr):
    """Nearest float16, the largest one in place of infinity."""
    if PTX:
        asm: tl.constexpr = "cvt.rn.satfinite.f16.f32 $0, $1;"
        half = tl.inline_asm_elementwise(asm, "=h,f", [x], dtype=tl.float16, is_pure=True, pack=1)
    else:
        half = tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    return half


@triton.jit
def bfloat16_bits(x, PTX: tl.constexpr):
    """The 16 bits of numbers as bfloat16, to nearest, ties to even."""
    if PTX or x.dtype == tl.bfloat16:
        bits = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        x = x.to(tl.float32)
        wide = x.to(tl.uint32, bitcast=True)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        bits = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
    return bits


@triton.jit
def encode(
    y,
    tables,
    CODE: tl.constexpr,
    IS_VALUE: tl.constexpr,
    SEARCH: tl.constexpr,
    SHAPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Indices and scales of rows of quads that the integer matrix has made d times too long.

    Returns:
        Magnitude nibbles and sign bytes (of E4M3_SCALED bytes, twice), and fp16 scales.
    """
    norm = tl.sqrt_rn(tl.sum(y * y, axis=1))
    factor = tl.div_rn(1.0, tl.maximum(norm, _SMALLEST_NORM * SHAPE.head_dim))
    factor = (factor * (_TARGETS[CODE] * SHAPE.head_dim**0.5))[:, None]
    y0, y1, y2, y3 = four(tl.reshape(y * factor, (y.shape[0], SHAPE.tile_dim // 4, 2, 2)))
    if CODE == 8:
        y0, y1, y2, y3 = e4m3_bytes(y0, PTX), e4m3_bytes(y1, PTX), e4m3_bytes(y2, PTX), e4m3_bytes(y3, PTX)
        squares = (_e4m3_squares(y0, PTX) + _e4m3_squares(y1, PTX)) + (
            _e4m3_squares(y2, PTX) + _e4m3_squares(y3, PTX)
        )
        length = tl.sqrt_rn(tl.sum(squares, axis=1))
        nibbles = (y0 | (y1 << 8)) | ((y2 | (y3 << 8)) << 16)
        signs = nibbles
    else:
        even, odd, signs, halves = _quad_sizes(y0, y1, y2, y3, PTX)
        # columns beyond head_dim are zeros, which take the smallest level
        beyond: tl.constexpr = (SHAPE.tile_dim - SHAPE.head_dim) * _SMALLEST_SQUARES[CODE]
        nibbles = _quad_nibbles(even, odd, CODE, 0, PTX)
        squares, products = _quad_sums(nibbles, halves, tables, PTX)
        squares = tl.sum(squares, axis=1) - beyond
        num_sets: tl.constexpr = _num_sets(CODE) if SEARCH else 1
        if num_sets > 1:
            best = _likeness(squares, tl.sum(products, axis=1))
            for i in tl.static_range(1, num_sets):
                others = _quad_nibbles(even, odd, CODE, i, PTX)
                other_squares, products = _quad_sums(others, halves, tables, PTX)
                other_squares = tl.sum(other_squares, axis=1) - beyond
                likeness = _likeness(other_squares, tl.sum(products, axis=1))
                closer = likeness > best
                nibbles = tl.where(closer[:, None], others, nibbles)
                squares = tl.where(closer, other_squares, squares)
                best = tl.maximum(likeness, best)
        length = tl.sqrt_rn(squares.to(tl.float32)) * 0.25
    scales = tl.div_rn(norm * (1.0 / SHAPE.head_dim), tl.maximum(length, _SMALLEST_NORM))
    if SEARCH and IS_VALUE and _VALUE_GAINS[CODE] != 1.0:
        limit: tl.constexpr = 4 * _TARGETS[CODE] * _TARGETS[CODE] * SHAPE.head_dim * _GAIN_LIKENESS
        scales = tl.where(best < limit, scales * _VALUE_GAINS[CODE], scales)
    return nibbles, signs, saturated_float16(scales, PTX)
