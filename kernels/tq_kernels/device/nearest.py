"""Device functions that find the nearest levels of four neighbouring channels, by boundaries between them.

On NVIDIA two float16 at a time look for their boundaries; plain float32 gives the same bits.
"""

import re
import struct

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS, midpoints


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


_EDGES = tl.constexpr({bits: midpoints(levels) for bits, levels in LEVELS.items()})
_NIBBLES = tl.constexpr({bits: _nibbles_asm(midpoints(levels)) for bits, levels in LEVELS.items()})
_SIZES = tl.constexpr(
    """{
    .reg .b32 p, q;
    cvt.rz.f16x2.f32 p, $5, $3;
    cvt.rz.f16x2.f32 q, $6, $4;
    prmt.b32 $2, p, q, 0x7351;
    abs.f16x2 $0, p;
    abs.f16x2 $1, q;
    }"""
)


@triton.constexpr_function
def _edges(code):
    return _EDGES[code]


@triton.constexpr_function
def _nibbles_assembly(code):
    return _NIBBLES[code]


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
    """Bits of the size of x as a float16 that is not larger."""
    size = (x.to(tl.uint32, bitcast=True) & 0x7FFFE000).to(tl.float32, bitcast=True)
    return size.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _quad_sizes(x0, x1, x2, x3, PTX: tl.constexpr):
    """Four channels made ready for a search.

    Boundaries are float16 numbers, so truncation to float16 moves no number across one, and two channels go
    through every instruction together.

    Returns:
        Sizes of channels 0 and 2 as two float16 in a word, of 1 and 3 likewise, and bytes whose bit 7 is the
        sign (other bits mean nothing).
    """
    if PTX:
        even, odd, signs = tl.inline_asm_elementwise(
            _SIZES,
            "=&r,=&r,=&r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=(tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        even, odd = _truncated(x0) | (_truncated(x2) << 16), _truncated(x1) | (_truncated(x3) << 16)
        s0, s1 = x0.to(tl.uint32, bitcast=True), x1.to(tl.uint32, bitcast=True)
        s2, s3 = x2.to(tl.uint32, bitcast=True), x3.to(tl.uint32, bitcast=True)
        signs = (s0 >> 24) | ((s1 >> 24) << 8) | ((s2 >> 24) << 16) | ((s3 >> 24) << 24)
    return even, odd, signs


@triton.jit
def _half_of(word, SHIFT: tl.constexpr):
    """One of the two float16 in a word, as float32."""
    return ((word >> SHIFT) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nearest_levels(x0, x1, x2, x3, CODE: tl.constexpr, PTX: tl.constexpr):
    """Magnitudes of four channels, as nibbles of bytes 0 and 2 of a word, and bytes whose bit 7 is the sign.

    Other bits mean nothing.
    """
    even, odd, signs = _quad_sizes(x0, x1, x2, x3, PTX)
    if PTX:
        asm: tl.constexpr = _nibbles_assembly(CODE)
        nibbles = tl.inline_asm_elementwise(
            asm, "=&r,r,r", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        edges: tl.constexpr = _edges(CODE)
        low = _magnitudes(_half_of(even, 0), edges) + _magnitudes(_half_of(odd, 0), edges) * 16
        high = _magnitudes(_half_of(even, 16), edges) + _magnitudes(_half_of(odd, 16), edges) * 16
        # the other bytes as the assembly leaves them, so that nothing comes to rely on zeros there
        nibbles = low.to(tl.uint32) | (high.to(tl.uint32) << 16) | 0x64006400
    return nibbles, signs
