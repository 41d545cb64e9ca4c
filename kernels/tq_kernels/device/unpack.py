"""Device functions that turn packed bytes into float16 tiles, one tile per group of the packed axis.

A 32-bit word holds lane 0 to 3 of every group, so a tile of bytes ``[rows, n / groups]``, four a word, has
the shape of each group's tile: byte 4 u + lane stands where element ``g * n / groups + 4 u + lane`` belongs.
On NVIDIA one `prmt` looks four levels up and two `cvt` widen them; elsewhere, and in Triton's interpreter,
the same values come from plain integer arithmetic.
"""

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS, e4m3_levels


def _bytes_of_levels(bits: int, first: int) -> int:
    """e4m3 bytes of four levels of a code as one integer, the lowest level in the lowest byte."""
    table = e4m3_levels()
    return sum(table.index(level) << (8 * i) for i, level in enumerate(LEVELS[bits][first : first + 4]))


_LM4_LOW = tl.constexpr(_bytes_of_levels(4, 0))
_LM4_HIGH = tl.constexpr(_bytes_of_levels(4, 4))
_LM3_TABLE = tl.constexpr(_bytes_of_levels(3, 0))
_LM2_TABLE = tl.constexpr(_bytes_of_levels(2, 0))
_PTX_LM4 = tl.constexpr(
    f"""
    {{
    .reg .b32 m, t, low, high;
    .reg .b16 l, h;
    mov.b32 low, {_bytes_of_levels(4, 0)};
    mov.b32 high, {_bytes_of_levels(4, 4)};
    and.b32 m, $4, 0x77777777;
    prmt.b32 t, low, high, m;
    lop3.b32 t, $4, 0x80808080, t, 0xEA;
    mov.b32 {{l, h}}, t;
    cvt.rn.f16x2.e4m3x2 $0, l;
    cvt.rn.f16x2.e4m3x2 $1, h;
    shr.u32 m, m, 16;
    prmt.b32 t, low, high, m;
    shl.b32 m, $4, 4;
    lop3.b32 t, m, 0x80808080, t, 0xEA;
    mov.b32 {{l, h}}, t;
    cvt.rn.f16x2.e4m3x2 $2, l;
    cvt.rn.f16x2.e4m3x2 $3, h;
    }}
    """
)


@triton.jit
def _plain(words, signs, lane, CODE: tl.constexpr, GROUP: tl.constexpr):
    """Levels of one group in plain integer arithmetic; `signs` matters to LM3 only."""
    if CODE == 4:
        magnitude = (words >> (16 * GROUP + 4 * lane)) & 7
        sign = (words >> (8 * lane + 7 - 4 * GROUP)) & 1
        byte = (tl.where(magnitude < 4, _LM4_LOW, _LM4_HIGH) >> (8 * (magnitude & 3))) & 0x7F
    elif CODE == 3:
        magnitude = (words >> (2 * (GROUP % 2) + 16 * (GROUP // 2) + 4 * lane)) & 3
        sign = (signs >> (7 + 8 * (lane % 2) - 4 * (lane // 2) - GROUP)) & 1
        byte = (_LM3_TABLE >> (8 * magnitude)) & 0x7F
    else:
        magnitude = (words >> (8 * lane + GROUP)) & 1
        sign = (words >> (8 * lane + 7 - GROUP)) & 1
        byte = (_LM2_TABLE >> (8 * magnitude)) & 0x7F
    # the seven low bits of e4m3, moved up by seven, are a float16 that is 1/256 of the value
    half = ((sign << 15) | (byte << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return half * 256.0


@triton.jit
def all_groups(pointer, offsets, mask, CODE: tl.constexpr, SIGNS: tl.constexpr, PTX: tl.constexpr):
    """Tiles of all groups, a tuple of float16 tensors.

    Args:
        pointer: Section of the page that holds the plane of words, at its first byte.
        offsets: For every element its lane plus the lanes of all words before its own.
        mask: Which elements exist; of the others something finite is made.
        CODE: Number of the code.
        SIGNS: Bytes from the plane of words to the plane of sign words.
        PTX: Whether NVIDIA's instructions may be used.
    """
    if CODE == 16:
        values = tl.load(pointer.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0)
        groups = (values.to(tl.float16),)
    elif CODE >= 8:
        values = tl.load(pointer + offsets, mask=mask, other=0)
        groups = (values.to(tl.float8e4nv, bitcast=True).to(tl.float16),)
    elif PTX and CODE == 4:
        values = tl.load(pointer.to(tl.pointer_type(tl.int8)) + offsets, mask=mask, other=0)
        groups = tl.inline_asm_elementwise(
            _PTX_LM4, "=&r,=&r,=&r,=&r,r", [values], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        words, lanes = offsets >> 2, offsets & 3
        packed = tl.load(pointer.to(tl.pointer_type(tl.int32)) + words, mask=mask, other=0)
        if CODE == 4:
            groups = (_plain(packed, packed, lanes, 4, 0), _plain(packed, packed, lanes, 4, 1))
        else:
            signs = packed
            if CODE == 3:
                p_signs = (pointer + SIGNS).to(tl.pointer_type(tl.uint16)) + words
                signs = tl.load(p_signs, mask=mask, other=0).to(tl.int32)
            groups = (
                _plain(packed, signs, lanes, CODE, 0),
                _plain(packed, signs, lanes, CODE, 1),
                _plain(packed, signs, lanes, CODE, 2),
                _plain(packed, signs, lanes, CODE, 3),
            )
    return groups
