"""Device functions from packed words to levels, one group at a time: float16 tensors, one for every lane.

On NVIDIA one byte permutation looks four levels up and two conversions widen them; elsewhere, and in Triton's
interpreter, the same numbers come from plain integer arithmetic.
"""

import triton
import triton.language as tl

from tq_kernels.ptx import level_bytes, levels_of_groups
from tq_kernels.spec import Code

_CODES = {int(code): code for code in Code}


def _assembly(code: int) -> tuple[str, ...]:
    """Assembly of four groups, empty for groups that the code does not have."""
    groups = levels_of_groups(_CODES[code]) if code in _CODES else ()
    return groups + ("",) * (4 - len(groups))


_TABLES = tl.constexpr(tuple(level_bytes(_CODES[i]) if i in _CODES else (0, 0) for i in range(17)))
"""Two words of e4m3 bytes, by code."""
_ASSEMBLY = tl.constexpr(tuple(text for i in range(17) for text in _assembly(i)))
"""By code and, of each code, by group."""


@triton.jit
def byte_tables(zero, CODE: tl.constexpr):
    """Levels as eight e4m3 bytes, in two words; see `encode.level_tables` for the zero."""
    table: tl.constexpr = _TABLES[CODE]
    return zero ^ table[0], zero ^ table[1]


@triton.jit
def _lane(words, signs, tables, CODE: tl.constexpr, GROUP: tl.constexpr, LANE: tl.constexpr):
    """One lane in plain integer arithmetic."""
    if CODE >= 8:
        byte = words >> (8 * LANE)
    else:
        if CODE == 4:
            magnitude = (words >> (16 * GROUP + 4 * LANE)) & 7
            sign = (words >> (8 * LANE + 7 - 4 * GROUP)) & 1
        elif CODE == 3:
            magnitude = (words >> (2 * (GROUP % 2) + 16 * (GROUP // 2) + 4 * LANE)) & 3
            sign = (signs >> (8 * LANE + 7 - GROUP)) & 1
        else:
            magnitude = (words >> (8 * LANE + GROUP)) & 1
            sign = (words >> (8 * LANE + 7 - GROUP)) & 1
        table = tl.where(magnitude < 4, tables[0], tables[1])
        byte = ((table >> (8 * (magnitude & 3))) & 0x7F) | (sign << 7)
    # the seven low bits of e4m3, moved up by seven, are a float16 that is 1/256 of the number
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def group_levels(words, signs, tables, CODE: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Lanes 0 to 3 of a group of int32 words; `signs`, from `spread_signs`, matter to LM3 only."""
    if PTX:
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            _ASSEMBLY[4 * CODE + GROUP],
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


@triton.jit
def spread_signs(signs):
    """Sign words of LM3, uint16, as int32 in which bit 7 - group of byte lane is the sign of an element."""
    return signs.to(tl.int32) * 0x100001
