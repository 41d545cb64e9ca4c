"""Device functions from rotated coordinates to indices and scales, four neighbouring channels at a time.

A quad is four neighbouring channels of one token. Its magnitudes are the nibbles of bytes 0 and 2 of a word,
its signs bit 7 of the four bytes of another; bytes of E4M3_SCALED are one word. On NVIDIA two float16 at a
time look for their boundaries, and levels are squared four at a time; plain float32 gives the same bits.
"""

import re
import struct

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS, TARGETS, midpoints
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


def _search(bits: int) -> str:
    """Assembly that finds the magnitudes of the two float16 of x, as two float16 in y."""
    edges = midpoints(LEVELS[bits])
    if bits == 4:
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
    if bits == 3:
        return f"""
        set.ge.f16x2.f16x2 h, x, <{edges[1]}>;
        fma.rn.f16x2 e, h, <{edges[2] - edges[0]}>, <{edges[0]}>;
        set.ge.f16x2.f16x2 y, x, e;
        fma.rn.f16x2 y, h, <2.0>, y;"""
    return f"set.ge.f16x2.f16x2 y, x, <{edges[0]}>;"


def _encode_asm(bits: int) -> str:
    """Assembly from four floats to two words: nibbles in bytes 0 and 2, and bytes whose bit 7 is a sign.

    Boundaries are float16 numbers, so truncation to float16 moves no number across one, and two channels go
    through every instruction together.
    """
    return _assembly(
        f"""
        cvt.rz.f16x2.f32 p, $4, $2;
        cvt.rz.f16x2.f32 q, $5, $3;
        prmt.b32 $1, p, q, 0x7351;
        abs.f16x2 x, q;
        {_search(bits)}
        fma.rn.f16x2 z, y, <16.0>, <1024.0>;
        abs.f16x2 x, p;
        {_search(bits)}
        add.rn.f16x2 $0, y, z;"""
    )


_SMALLEST_NORM = tl.constexpr(1e-30)
_TARGETS = tl.constexpr(tuple(TARGETS.get(bits, 0.0) for bits in range(9)))
_EDGES_LM2 = tl.constexpr(midpoints(LEVELS[2]))
_EDGES_LM3 = tl.constexpr(midpoints(LEVELS[3]))
_EDGES_LM4 = tl.constexpr(midpoints(LEVELS[4]))
_LM2_LEVELS = tl.constexpr(_quarters(2, 0))
_LM3_LEVELS = tl.constexpr(_quarters(3, 0))
_LM4_LOW_LEVELS = tl.constexpr(_quarters(4, 0))
_LM4_HIGH_LEVELS = tl.constexpr(_quarters(4, 4))
_SMALLEST_SQUARES = tl.constexpr((0, 0, *(int(4 * LEVELS[bits][0]) ** 2 for bits in (2, 3, 4))))
"""Squares of the smallest levels, in sixteenths, by bits."""
_SQUARES = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $1, $1, 0x20; prmt.b32 t, $2, $3, t; dp4a.u32.u32 $0, t, t, 0; }"
)
_ENCODE_LM2 = tl.constexpr(_encode_asm(2))
_ENCODE_LM3 = tl.constexpr(_encode_asm(3))
_ENCODE_LM4 = tl.constexpr(_encode_asm(4))
_FP16_MAX = tl.constexpr(65504.0)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_E4M3_SUBNORMAL = tl.constexpr(2.0**14)
"""A float whose last place is the spacing of e4m3 numbers below the smallest normal one."""


@triton.jit
def _magnitudes(size, CODE: tl.constexpr):
    """Index of the nearest positive level, as a float; a size on a boundary takes the upper level.

    A binary search whose boundaries are computed: a multiply-add costs a GPU less than a select.
    """
    if CODE == 4:
        high = (size >= _EDGES_LM4[3]).to(tl.float32)
        middle = (size >= _EDGES_LM4[1] + high * (_EDGES_LM4[5] - _EDGES_LM4[1])).to(tl.float32)
        edge = (_EDGES_LM4[0] + high * (_EDGES_LM4[4] - _EDGES_LM4[0])) + middle * (
            (_EDGES_LM4[2] - _EDGES_LM4[0])
            + high * (_EDGES_LM4[6] - _EDGES_LM4[4] - _EDGES_LM4[2] + _EDGES_LM4[0])
        )
        index = high * 4 + (middle * 2 + (size >= edge).to(tl.float32))
    elif CODE == 3:
        high = (size >= _EDGES_LM3[1]).to(tl.float32)
        edge = _EDGES_LM3[0] + high * (_EDGES_LM3[2] - _EDGES_LM3[0])
        index = high * 2 + (size >= edge).to(tl.float32)
    else:
        index = (size >= _EDGES_LM2[0]).to(tl.float32)
    return index


@triton.jit
def _quad_indices(x0, x1, x2, x3, CODE: tl.constexpr, PTX: tl.constexpr):
    """Indices of four channels.

    Returns:
        Magnitudes as nibbles of bytes 0 and 2, and bytes whose bit 7 is the sign; other bits mean nothing.
    """
    if PTX:
        asm: tl.constexpr = _ENCODE_LM4 if CODE == 4 else (_ENCODE_LM3 if CODE == 3 else _ENCODE_LM2)
        nibbles, signs = tl.inline_asm_elementwise(
            asm, "=&r,=&r,f,f,f,f", [x0, x1, x2, x3], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        low = _magnitudes(tl.abs(x0), CODE) + _magnitudes(tl.abs(x1), CODE) * 16
        high = _magnitudes(tl.abs(x2), CODE) + _magnitudes(tl.abs(x3), CODE) * 16
        # the other bytes as the assembly leaves them, so that nothing comes to rely on zeros there
        nibbles = low.to(tl.uint32) | (high.to(tl.uint32) << 16) | 0x64006400
        s0, s1 = x0.to(tl.uint32, bitcast=True), x1.to(tl.uint32, bitcast=True)
        s2, s3 = x2.to(tl.uint32, bitcast=True), x3.to(tl.uint32, bitcast=True)
        signs = (s0 >> 24) | ((s1 >> 24) << 8) | ((s2 >> 24) << 16) | ((s3 >> 24) << 24)
    return nibbles, signs


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
def _quad_squares(nibbles, tables, PTX: tl.constexpr):
    """Sum of the squares of four channels' levels, in sixteenths."""
    if PTX:
        total = tl.inline_asm_elementwise(
            _SQUARES,
            "=r,r,r,r",
            [nibbles, tables[0], tables[1]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        total = (nibbles * 0).to(tl.int32)
        for channel in tl.static_range(4):
            index = (nibbles >> (4 * channel + 8 * (channel // 2))).to(tl.int32)
            levels = tl.where((index & 4) == 0, tables[0], tables[1])
            level = (levels >> (8 * (index & 3))) & 0xFF
            total += level * level
    return total


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
def encode(y, tables, CODE: tl.constexpr, SHAPE: tl.constexpr, PTX: tl.constexpr):
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
        nibbles, signs = _quad_indices(y0, y1, y2, y3, CODE, PTX)
        # columns beyond head_dim are zeros, which take the smallest level
        beyond: tl.constexpr = (SHAPE.tile_dim - SHAPE.head_dim) * _SMALLEST_SQUARES[CODE]
        squares = tl.sum(_quad_squares(nibbles, tables, PTX), axis=1) - beyond
        length = tl.sqrt_rn(squares.to(tl.float32)) * 0.25
    scales = tl.div_rn(norm * (1.0 / SHAPE.head_dim), tl.maximum(length, _SMALLEST_NORM))
    return nibbles, signs, saturated_float16(scales, PTX)
