"""Device functions that choose a vector's cell size by the tables of `cells`, and its magnitudes with it.

A word of the table holds the magnitudes of all three sizes and the differences of their squared errors, so a
channel is looked up once. Sums are of whole numbers: all machines choose alike.
"""

import triton
import triton.language as tl

from tq_kernels import cells
from tq_kernels.codebook import LEVELS
from tq_kernels.device.pack import four, select_bytes

_LAST_STEP = tl.constexpr(cells.NUM_STEPS - 1)
_NO_SIZE = tl.constexpr({bits: tuple(each[0] for each in cells.differences(bits)) for bits in LEVELS})
"""Differences of a channel that is zero, by bits."""
STEP = tl.constexpr(
    "{ .reg .f32 u; abs.f32 u, $1; mul.rn.sat.f32 u, u, $2; fma.rz.f32 $0, u, 0f387F0000, 0f40000000; }"
)
"""The step in the low byte: 255 units in the last place of 2.0, times the size, which saturates at one, are
added to 2.0, and what is less than such a unit is dropped."""


@triton.constexpr_function
def _sum_of_zeros(code, count):
    """What channels that are zero add to the sum of both differences."""
    near, far = _NO_SIZE[code]
    return count * (near + (far << 16))


@triton.jit
def _steps(y, factor, PTX: tl.constexpr):
    """Steps of sizes, factor being that which brings the end of their range to one.

    Bit 30 means nothing. To look a step up is to shift it by two, which leaves that bit behind.
    """
    if PTX:
        step = tl.inline_asm_elementwise(STEP, "=r,f,f", [y, factor], dtype=tl.int32, is_pure=True, pack=1)
    else:
        size = tl.abs(y) * factor
        size = tl.where(size >= 0, tl.minimum(size, 1.0), 0.0)  # what is no number has no size
        step = (size.to(tl.float64) * _LAST_STEP).to(tl.int32)
    return step


@triton.jit
def _low_signed(x, BITS: tl.constexpr):
    """The number in two's complement that the low bits are."""
    return ((x & ((1 << BITS) - 1)) ^ (1 << (BITS - 1))) - (1 << (BITS - 1))


@triton.jit
def _bytes_of_quads(x, BYTE: tl.constexpr, QUADS: tl.constexpr, PTX: tl.constexpr):
    """That byte of each channel of a quad, in a word."""
    x0, x1, x2, x3 = four(tl.reshape(x.to(tl.uint32, bitcast=True), (x.shape[0], QUADS, 2, 2)))
    pair: tl.constexpr = BYTE | (BYTE + 4) << 4
    return select_bytes(select_bytes(x0, x1, pair, PTX), select_bytes(x2, x3, pair, PTX), 0x5410, PTX)


@triton.jit
def best_of_sizes(y, factor, words, CODE: tl.constexpr, SHAPE: tl.constexpr, PTX: tl.constexpr):
    """Magnitudes of the rows of y at the cell size of least error; of equals the first.

    Channels beyond head_dim are zeros. `factor` is what brings the end of the range of a row's sizes to one,
    `words` the table of the code.

    Returns:
        Of each quad a word of magnitudes, as nibbles of bytes 0 and 2; one of bytes whose bit 7 is the sign
        (other bits of the two mean nothing); and one of steps, as bytes.
    """
    ROWS: tl.constexpr = y.shape[0]
    QUADS: tl.constexpr = SHAPE.tile_dim // 4
    step = _steps(y, tl.broadcast_to(factor[:, None], y.shape), PTX)
    word = tl.gather(words, tl.reshape(step, (ROWS * SHAPE.tile_dim,)), 0)
    w0, w1, w2, w3 = four(tl.reshape(word, (ROWS, QUADS, 2, 2)))
    # sums of 16 channels are told apart first: those of more need more bits
    sums = tl.sum(tl.reshape((w0 + w1) + (w2 + w3), (ROWS, QUADS // 16, 4, 4)), axis=2)
    near = _low_signed(sums, 11)
    far = _low_signed((sums - near) >> 11, 11)
    beyond: tl.constexpr = _sum_of_zeros(CODE, SHAPE.tile_dim - SHAPE.head_dim)
    both = tl.sum(tl.sum(near + (far << 16), axis=1), axis=1) - beyond
    near = _low_signed(both, 16)
    far = (both - near) >> 16
    shift = tl.where(far < tl.minimum(near, 0), 6, tl.where(near < 0, 3, 0)).to(tl.uint32)[:, None]
    even = select_bytes(w0.to(tl.uint32, bitcast=True), w2.to(tl.uint32, bitcast=True), 0x7632, PTX)
    odd = select_bytes(w1.to(tl.uint32, bitcast=True), w3.to(tl.uint32, bitcast=True), 0x7632, PTX)
    nibbles = ((even >> (shift + 6)) & 0x00070007) | ((odd >> (shift + 2)) & 0x00700070)
    return nibbles, _bytes_of_quads(y, 3, QUADS, PTX), _bytes_of_quads(step, 0, QUADS, PTX)
