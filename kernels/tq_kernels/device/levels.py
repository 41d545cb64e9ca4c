"""Device functions from packed words to levels, one group at a time: float16 tensors, one for every lane.

On NVIDIA one byte permutation looks four levels up and two conversions widen them; elsewhere, and in Triton's
interpreter, the same numbers come from plain integer arithmetic.
"""

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS, e4m3_levels


def _bytes_of_levels(bits: int, first: int) -> int:
    """The e4m3 bytes of four levels as one integer, the lowest level in the lowest byte."""
    table = e4m3_levels()
    return sum(table.index(level) << (8 * i) for i, level in enumerate(LEVELS[bits][first : first + 4]))


def _widen(body: str) -> str:
    """Assembly with a body that leaves four e4m3 bytes in x; they become the four outputs."""
    return f"""
    {{
        .reg .b32 x, m, s; .reg .b16 low, high;
        {body}
        mov.b32 {{low, high}}, x;
        cvt.rn.f16x2.e4m3x2 m, low;
        cvt.rn.f16x2.e4m3x2 s, high;
        mov.b32 {{$0, $1}}, m;
        mov.b32 {{$2, $3}}, s;
    }}
    """


def _lm4(group: int) -> str:
    return _widen(
        f"""
        shr.u32 m, $4, {16 * group};
        and.b32 m, m, 0x7777;
        prmt.b32 x, $6, $7, m;
        shl.b32 s, $4, {4 * group};
        lop3.b32 x, s, 0x80808080, x, 0xEA;"""
    )


def _lm3(group: int) -> str:
    return _widen(
        f"""
        shr.u32 m, $4, {(0, 2, 16, 18)[group]};
        and.b32 m, m, 0x3333;
        prmt.b32 x, $6, $7, m;
        mul.lo.u32 s, $5, {0x100001 << group};
        lop3.b32 x, s, 0x80808080, x, 0xEA;"""
    )


def _lm2(group: int) -> str:
    low, high = _bytes_of_levels(2, 0) & 0xFF, _bytes_of_levels(2, 0) >> 8
    return _widen(
        f"""
        shr.u32 m, $4, {group};
        and.b32 m, m, 0x01010101;
        mad.lo.u32 x, m, {high - low}, {low * 0x01010101};
        shl.b32 s, $4, {group};
        lop3.b32 x, s, 0x80808080, x, 0xEA;"""
    )


_LM2_TABLE = tl.constexpr(_bytes_of_levels(2, 0))
_LM3_TABLE = tl.constexpr(_bytes_of_levels(3, 0))
_LM4_LOW_TABLE = tl.constexpr(_bytes_of_levels(4, 0))
_LM4_HIGH_TABLE = tl.constexpr(_bytes_of_levels(4, 4))
_LM2_LANES = tl.constexpr(tuple(_lm2(group) for group in range(4)))
_LM3_LANES = tl.constexpr(tuple(_lm3(group) for group in range(4)))
_LM4_LANES = tl.constexpr(tuple(_lm4(group) for group in range(2)))


@triton.jit
def byte_tables(zero, CODE: tl.constexpr):
    """Levels as eight e4m3 bytes; see `pack.level_tables` for the zero."""
    if CODE == 4:
        low, high = zero ^ _LM4_LOW_TABLE, zero ^ _LM4_HIGH_TABLE
    elif CODE == 3:
        low, high = zero ^ _LM3_TABLE, zero
    else:
        low, high = zero ^ _LM2_TABLE, zero
    return low, high


@triton.jit
def e4m3_numbers(byte, PTX: tl.constexpr):
    """Bytes 0 to 255 of any integer type as float16."""
    if PTX:
        number = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # the seven low bits of e4m3, moved up by seven, are a float16 that is 1/256 of the number
        byte = byte.to(tl.int32)
        number = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.int16).to(
            tl.float16, bitcast=True
        ) * 256.0
    return number


@triton.jit
def _lane(words, signs, tables, CODE: tl.constexpr, GROUP: tl.constexpr, LANE: tl.constexpr):
    """One lane in plain integer arithmetic."""
    if CODE == 4:
        magnitude = (words >> (16 * GROUP + 4 * LANE)) & 7
        sign = (words >> (8 * LANE + 7 - 4 * GROUP)) & 1
    elif CODE == 3:
        magnitude = (words >> (2 * (GROUP % 2) + 16 * (GROUP // 2) + 4 * LANE)) & 3
        sign = (signs >> (7 + 8 * (LANE % 2) - 4 * (LANE // 2) - GROUP)) & 1
    else:
        magnitude = (words >> (8 * LANE + GROUP)) & 1
        sign = (words >> (8 * LANE + 7 - GROUP)) & 1
    table = tl.where(magnitude < 4, tables[0], tables[1])
    return e4m3_numbers(((table >> (8 * (magnitude & 3))) & 0x7F) | (sign << 7), False)


@triton.jit
def group_levels(words, signs, tables, CODE: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Lanes 0 to 3 of a group of int32 words; `signs`, int32 as well, matters to LM3 only."""
    if CODE >= 8:
        x0, x1 = e4m3_numbers(words & 0xFF, PTX), e4m3_numbers((words >> 8) & 0xFF, PTX)
        x2, x3 = e4m3_numbers((words >> 16) & 0xFF, PTX), e4m3_numbers((words >> 24) & 0xFF, PTX)
    elif PTX:
        lanes: tl.constexpr = _LM4_LANES if CODE == 4 else (_LM3_LANES if CODE == 3 else _LM2_LANES)
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            lanes[GROUP],
            "=h,=h,=h,=h,r,r,r,r",
            [words, signs, tables[0], tables[1]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        x0, x1 = _lane(words, signs, tables, CODE, GROUP, 0), _lane(words, signs, tables, CODE, GROUP, 1)
        x2, x3 = _lane(words, signs, tables, CODE, GROUP, 2), _lane(words, signs, tables, CODE, GROUP, 3)
    return x0, x1, x2, x3
