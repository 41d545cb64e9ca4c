"""Device functions that turn the indices of quads into packed words: byte selections, joins, transpositions.

A word of keys joins quads of one token, one of every group of channels. A word of values holds tokens of one
channel: quads of one token of every group are joined first, and then four such tokens by four channels are
transposed in registers.
"""

import triton
import triton.language as tl

_SELECT_BYTES = tl.constexpr("prmt.b32 $0, $1, $2, $3;")


@triton.jit
def select_bytes(low, high, SELECTOR: tl.constexpr, PTX: tl.constexpr):
    """Four of eight bytes, 0 to 3 of `low` and 4 to 7 of `high`: one for every nibble of the selector."""
    if PTX:
        selected = tl.inline_asm_elementwise(
            _SELECT_BYTES, "=r,r,r,r", [low, high, SELECTOR], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        selected = low * 0
        for i in tl.static_range(4):
            source = (SELECTOR >> (4 * i)) & 7
            byte = (low >> (8 * source)) if source < 4 else (high >> (8 * source - 32))
            selected |= (byte & 0xFF) << (8 * i)
    return selected


@triton.jit
def four(x):
    """Elements 0 to 3 of the last two dimensions, two by two."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_groups(nibbles, signs, CODE: tl.constexpr, PTX: tl.constexpr):
    """Groups, which the last dimension counts, together.

    Returns:
        Magnitudes, where a nibble of either half of a word belongs to one lane, and signs, where a byte does.
    """
    if CODE == 4:
        n0, n1 = tl.split(nibbles)
        s0, s1 = tl.split(signs)
        nibbles = select_bytes(n0, n1, 0x6420, PTX)
        signs = (s0 & 0x80808080) | ((s1 >> 4) & 0x08080808)
    else:
        shape: tl.constexpr = nibbles.shape[:-1] + (2, 2)
        n0, n1, n2, n3 = four(tl.reshape(nibbles, shape))
        s0, s1, s2, s3 = four(tl.reshape(signs, shape))
        # bytes 1 and 3 mean nothing and must be gone before anything is shifted
        if CODE == 3:
            even, odd = select_bytes(n0, n2, 0x6420, PTX), select_bytes(n1, n3, 0x6420, PTX)
            nibbles = even | (odd << 2)
        else:
            low, high = select_bytes(n0, n1, 0x6420, PTX), select_bytes(n2, n3, 0x6420, PTX)
            joined = low | (high << 2)
            nibbles = (joined & 0x5555) | ((joined >> 15) & 0xAAAA)
        signs = (s0 & 0x80808080) | ((s1 >> 1) & 0x40404040)
        signs |= ((s2 >> 2) & 0x20202020) | ((s3 >> 3) & 0x10101010)
    return nibbles, signs


@triton.jit
def finish(nibbles, signs, CODE: tl.constexpr):
    """Words, and sign words (of LM3 only), of joined groups."""
    if CODE == 4:
        words = nibbles | signs
    elif CODE == 3:
        words = nibbles
        signs = (signs & 0xF0F0) | ((signs >> 20) & 0x0F0F)
    else:
        spread = (nibbles | (nibbles << 8)) & 0x00FF00FF
        words = ((spread | (spread << 4)) & 0x0F0F0F0F) | signs
    return words, signs


@triton.jit
def transpose_bytes(x0, x1, x2, x3, PTX: tl.constexpr):
    """Byte j of word i to byte i of word j."""
    a, b = select_bytes(x0, x1, 0x5140, PTX), select_bytes(x0, x1, 0x7362, PTX)
    c, d = select_bytes(x2, x3, 0x5140, PTX), select_bytes(x2, x3, 0x7362, PTX)
    y0, y1 = select_bytes(a, c, 0x5410, PTX), select_bytes(a, c, 0x7632, PTX)
    y2, y3 = select_bytes(b, d, 0x5410, PTX), select_bytes(b, d, 0x7632, PTX)
    return y0, y1, y2, y3


@triton.jit
def transpose_nibbles(x0, x1, x2, x3, PTX: tl.constexpr):
    """Nibble j of either half of word i to nibble i of the same half of word j."""
    a, b = (x0 & 0x0F0F0F0F) | ((x1 << 4) & 0xF0F0F0F0), ((x0 >> 4) & 0x0F0F0F0F) | (x1 & 0xF0F0F0F0)
    c, d = (x2 & 0x0F0F0F0F) | ((x3 << 4) & 0xF0F0F0F0), ((x2 >> 4) & 0x0F0F0F0F) | (x3 & 0xF0F0F0F0)
    y0, y1 = select_bytes(a, c, 0x6240, PTX), select_bytes(b, d, 0x6240, PTX)
    y2, y3 = select_bytes(a, c, 0x7351, PTX), select_bytes(b, d, 0x7351, PTX)
    return y0, y1, y2, y3
