"""Device functions from rotated coordinates to indices and scales, four neighbouring channels at a time.

A quad is four neighbouring channels of one token. Its magnitudes are the nibbles of bytes 0 and 2 of a word,
its signs bit 7 of the four bytes of another; bytes of E4M3_SCALED are one word. On NVIDIA levels are squared
four at a time; plain integers give the same bits.
"""

import triton
import triton.language as tl

from tq_kernels.cells import NUM_STEPS, RANGES
from tq_kernels.codebook import GAIN_LIKENESS, LEVELS, TARGETS, VALUE_GAINS
from tq_kernels.device.cell_sizes import best_of_sizes
from tq_kernels.device.nearest import nearest_levels
from tq_kernels.device.pack import four


def _quarters(bits: int, first: int) -> int:
    """Four levels, in quarters, as the bytes of a signed integer, the lowest level in the lowest byte."""
    quarters = [int(4 * level) for level in LEVELS[bits][first : first + 4]]
    return int.from_bytes(bytes(quarters).ljust(4, b"\0"), "little", signed=True)


_SMALLEST_NORM = tl.constexpr(1e-30)
_TARGETS = tl.constexpr(tuple(TARGETS.get(bits, 0.0) for bits in range(9)))
_RANGES = tl.constexpr(RANGES)
_STEP_SIZES = tl.constexpr({bits: size / (NUM_STEPS - 1) for bits, size in RANGES.items()})
_VALUE_GAINS = tl.constexpr(tuple(VALUE_GAINS.get(bits, 1.0) for bits in range(9)))
_GAIN_LIKENESS = tl.constexpr(GAIN_LIKENESS)
_LM2_LEVELS = tl.constexpr(_quarters(2, 0))
_LM3_LEVELS = tl.constexpr(_quarters(3, 0))
_LM4_LOW_LEVELS = tl.constexpr(_quarters(4, 0))
_LM4_HIGH_LEVELS = tl.constexpr(_quarters(4, 4))
_SMALLEST_QUARTERS = tl.constexpr({bits: int(4 * levels[0]) for bits, levels in LEVELS.items()})
"""The smallest levels, in quarters, by bits."""
_SQUARES = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $1, $1, 0x20; prmt.b32 t, $2, $3, t; dp4a.u32.u32 $0, t, t, 0; }"
)
_PRODUCTS = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $1, $1, 0x20; prmt.b32 t, $3, $4, t;"
    " dp4a.u32.u32 $0, t, $2, 0; shl.b32 $0, $0, 1; dp4a.u32.u32 $0, t, 0x01010101, $0; }"
)
_FP16_MAX = tl.constexpr(65504.0)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_E4M3_SUBNORMAL = tl.constexpr(2.0**14)
"""A float whose last place is the spacing of e4m3 numbers below the smallest normal one."""


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
def _level_of(nibbles, CHANNEL: tl.constexpr, tables):
    """Level, in quarters, of one channel of quads."""
    index = (nibbles >> (4 * CHANNEL + 8 * (CHANNEL // 2))).to(tl.int32)
    levels = tl.where((index & 4) == 0, tables[0], tables[1])
    return (levels >> (8 * (index & 3))) & 0xFF


@triton.jit
def _squares(nibbles, tables, PTX: tl.constexpr):
    """Of four channels, the sum of the levels' squares in sixteenths."""
    if PTX:
        squares = tl.inline_asm_elementwise(
            _SQUARES, "=r,r,r,r", [nibbles, tables[0], tables[1]], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        squares = (nibbles * 0).to(tl.int32)
        for channel in tl.static_range(4):
            level = _level_of(nibbles, channel, tables)
            squares += level * level
    return squares


@triton.jit
def _products(nibbles, steps, tables, PTX: tl.constexpr):
    """Of four channels, the sum of sizes, in half steps, times levels, in quarters."""
    if PTX:
        products = tl.inline_asm_elementwise(
            _PRODUCTS,
            "=&r,r,r,r,r",
            [nibbles, steps, tables[0], tables[1]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        products = (nibbles * 0).to(tl.int32)
        for channel in tl.static_range(4):
            step = ((steps >> (8 * channel)) & 0xFF).to(tl.int32)
            products += _level_of(nibbles, channel, tables) * (2 * step + 1)
    return products


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
    cells,
    CODE: tl.constexpr,
    IS_VALUE: tl.constexpr,
    SEARCH: tl.constexpr,
    SHAPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Indices and scales of rows of quads that the integer matrix has made d times too long.

    `cells` is the code's table of `cells.words`; only SEARCH reads it.

    Returns:
        Magnitude nibbles and sign bytes (of E4M3_SCALED bytes, twice), and fp16 scales.
    """
    QUADS: tl.constexpr = SHAPE.tile_dim // 4
    TARGET: tl.constexpr = _TARGETS[CODE] * SHAPE.head_dim**0.5
    norm = tl.sqrt_rn(tl.sum(y * y, axis=1))
    factor = tl.div_rn(1.0, tl.maximum(norm, _SMALLEST_NORM * SHAPE.head_dim))
    if CODE == 8:
        y0, y1, y2, y3 = four(tl.reshape(y * (factor * TARGET)[:, None], (y.shape[0], QUADS, 2, 2)))
        y0, y1, y2, y3 = e4m3_bytes(y0, PTX), e4m3_bytes(y1, PTX), e4m3_bytes(y2, PTX), e4m3_bytes(y3, PTX)
        e4m3_squares = (_e4m3_squares(y0, PTX) + _e4m3_squares(y1, PTX)) + (
            _e4m3_squares(y2, PTX) + _e4m3_squares(y3, PTX)
        )
        length = tl.sqrt_rn(tl.sum(e4m3_squares, axis=1))
        nibbles = (y0 | (y1 << 8)) | ((y2 | (y3 << 8)) << 16)
        signs = nibbles
    else:
        if SEARCH:
            in_range = factor * (TARGET / _RANGES[CODE])
            nibbles, signs, steps = best_of_sizes(y, in_range, cells, CODE, SHAPE, PTX)
        else:
            y0, y1, y2, y3 = four(tl.reshape(y * (factor * TARGET)[:, None], (y.shape[0], QUADS, 2, 2)))
            nibbles, signs = nearest_levels(y0, y1, y2, y3, CODE, PTX)
        # columns beyond head_dim are zeros, which take the smallest level
        BEYOND: tl.constexpr = (SHAPE.tile_dim - SHAPE.head_dim) * _SMALLEST_QUARTERS[CODE]
        squares = tl.sum(_squares(nibbles, tables, PTX), axis=1) - BEYOND * _SMALLEST_QUARTERS[CODE]
        length = tl.sqrt_rn(squares.to(tl.float32)) * 0.25
    scales = tl.div_rn(norm * (1.0 / SHAPE.head_dim), tl.maximum(length, _SMALLEST_NORM))
    if SEARCH and IS_VALUE and _VALUE_GAINS[CODE] != 1.0:
        limit: tl.constexpr = (2 * _TARGETS[CODE] / _STEP_SIZES[CODE]) ** 2 * SHAPE.head_dim * _GAIN_LIKENESS
        best = _likeness(squares, tl.sum(_products(nibbles, steps, tables, PTX), axis=1) - BEYOND)
        scales = tl.where(best < limit, scales * _VALUE_GAINS[CODE], scales)
    return nibbles, signs, saturated_float16(scales, PTX)
