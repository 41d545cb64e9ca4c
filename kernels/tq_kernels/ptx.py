"""PTX that turns a packed word into four float16 levels of one group, for kernels on NVIDIA."""

from tq_kernels.codebook import LEVELS, e4m3_levels
from tq_kernels.layout import WORD_FORMATS
from tq_kernels.spec import Code


def level_bytes(code: Code) -> tuple[int, int]:
    """e4m3 bytes of a code's positive levels, ascending from the lowest byte of two 32-bit words."""
    table = e4m3_levels()
    levels = [table.index(level) for level in LEVELS.get(code, ())]
    return _word(levels[:4]), _word(levels[4:])


def levels_of_groups(code: Code) -> tuple[str, ...]:
    """Inline assembly for every group of a code's words.

    Outputs are the levels of lanes 0 to 3, 16 bits each; inputs the word, its sign word times 0x100001 (LM3),
    and the two words of `level_bytes`. `proto/BLOCK_FORMAT.md` has the bytes in one line per code; `cvt`
    widens them at the rate of integer instructions.
    """
    return tuple(_levels_of_group(code, group) for group in range(WORD_FORMATS[code].groups))


def _levels_of_group(code: Code, group: int) -> str:
    if code is Code.LM4:
        pick = f"and.b32 m, $4, 0x77777777; shr.u32 m, m, {16 * group}; prmt.b32 x, $6, $7, m;"
        sign = f"shl.b32 s, $4, {4 * group};"
    elif code is Code.LM3:
        # the same steps for two groups, so that the assembler takes them once
        odd, high = group % 2, group // 2
        pick = f"""shr.u32 m, $4, {2 * odd}; and.b32 m, m, 0x33333333; shr.u32 m, m, {16 * high};
        prmt.b32 x, $6, 0, m;"""
        sign = f"shl.b32 s, $5, {group};"
    elif code is Code.LM2:
        small, large = level_bytes(code)[0] & 0xFF, level_bytes(code)[0] >> 8
        odd, high = group % 2, group // 2
        pick = f"""shr.u32 m, $4, {2 * high}; and.b32 m, m, {0x01010101 << odd};
        mad.lo.u32 x, m, {(large - small) >> odd}, {small * 0x01010101};"""
        sign = f"shl.b32 s, $4, {group};"
    else:
        pick, sign = "mov.b32 x, $4;", ""
    apply_sign = "lop3.b32 x, s, 0x80808080, x, 0xEA;" if sign else ""
    return f"""{{
    .reg .b32 x, y, m, s;
    .reg .b16 lo, hi;
    {pick} {sign} {apply_sign}
    mov.b32 {{lo, hi}}, x;
    cvt.rn.f16x2.e4m3x2 y, lo;
    mov.b32 {{$0, $1}}, y;
    cvt.rn.f16x2.e4m3x2 y, hi;
    mov.b32 {{$2, $3}}, y;
    }}"""


def _word(values: list[int]) -> int:
    return sum(value << (8 * i) for i, value in enumerate(values))
