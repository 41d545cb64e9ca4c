"""Device functions that turn packed words into float16 levels, and say which element stands where.

Attention sums over the axis along which keys and values are packed, and a sum has no order. So a tile of
words ``[rows, words]`` becomes a tile ``[rows, words * elements]`` in the order in which elements leave a
register, and `element` names the channel or token of each column. Levels come out divided by `unit_of` their
code: the seven low bits of an e4m3 number, moved up by seven, are a float16 that is 1/256 of it. NaNs of e4m3
become finite.
"""

import triton
import triton.language as tl

from tq_kernels.codebook import LEVELS, e4m3_levels
from tq_kernels.layout import WORD_FORMATS
from tq_kernels.spec import Code


def _bytes_of_levels(bits: int, first: int) -> int:
    """e4m3 bytes of four levels of a code as one integer, the lowest level in the lowest byte."""
    table = e4m3_levels()
    return sum(table.index(level) << (8 * i) for i, level in enumerate(LEVELS[bits][first : first + 4]))


_LM4_LOW = tl.constexpr(_bytes_of_levels(4, 0))
_LM4_HIGH = tl.constexpr(_bytes_of_levels(4, 4))
_LM3_TABLE = tl.constexpr(_bytes_of_levels(3, 0))
_LM2_LOW = tl.constexpr((_bytes_of_levels(2, 0) & 0xFF) * 0x01010101)
_LM2_STEP = tl.constexpr((_bytes_of_levels(2, 0) >> 8) - (_bytes_of_levels(2, 0) & 0xFF))
_EVERY_SIGN = tl.constexpr(0x80808080 - (1 << 32))
_HALF_SIGNS = tl.constexpr(0x80008000 - (1 << 32))
_HALF_LEVELS = tl.constexpr(0x3F803F80)


@triton.constexpr_function
def elements_of(code):
    """Elements in one word of a code."""
    return WORD_FORMATS[Code(code)].elements


@triton.constexpr_function
def unit_of(code):
    """What the levels of a code were divided by."""
    return 1.0 if code == 16 else 256.0


@triton.jit
def element(column, SIZE: tl.constexpr, CODE: tl.constexpr):
    """Place on a packed axis of SIZE elements of what stands in a column of the tile of its words."""
    if CODE == 16:
        place = column
    else:
        E: tl.constexpr = elements_of(CODE)
        part = column % E
        lane = part // (E // 2) + 2 * (part % 2)
        place = column // E * 4 + lane
        if CODE == 4:
            place += (part // 2 % 2) * (SIZE // 2)
        elif CODE < 4:
            place += (part // 4 % 2 + part // 2 % 2 * 2) * (SIZE // 4)
    return place


@triton.jit
def _look_up(selectors, LOW: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr):
    """Bytes out of eight, by the numbers 0 to 7 in the four low nibbles of a selector."""
    if PTX:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, $1;",
            "=r,r,r,r",
            [selectors, LOW, HIGH],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        found = selectors & 0
        for lane in tl.static_range(4):
            number = (selectors >> (4 * lane)) & 7
            found |= ((tl.where(number < 4, LOW, HIGH) >> (8 * (number & 3))) & 0x7F) << (8 * lane)
    return found


@triton.jit
def _level_bytes(words, signs, G: tl.constexpr, CODE: tl.constexpr, PTX: tl.constexpr):
    """e4m3 bytes of the four lanes of one group, lane 0 in the lowest byte."""
    if CODE == 4:
        levels = _look_up((words >> (16 * G)) & 0x7777, _LM4_LOW, _LM4_HIGH, PTX)
        found = levels | ((words << (4 * G)) & _EVERY_SIGN)
    elif CODE == 3:
        levels = _look_up((words >> (2 * (G % 2) + 16 * (G // 2))) & 0x3333, _LM3_TABLE, _LM3_TABLE, PTX)
        found = levels | (((signs * 0x100001) << G) & _EVERY_SIGN)
    elif CODE == 2:
        levels = ((words >> G) & 0x01010101) * _LM2_STEP + _LM2_LOW
        found = levels | ((words << G) & _EVERY_SIGN)
    else:
        found = words
    return found


@triton.jit
def _halves(levels):
    """Four e4m3 bytes as two words of float16 pairs in a new last dimension: lanes 0 and 2, lanes 1 and 3."""
    even = ((levels << 8) & _HALF_SIGNS) | ((levels << 7) & _HALF_LEVELS)
    odd = (levels & _HALF_SIGNS) | ((levels >> 1) & _HALF_LEVELS)
    return tl.join(even, odd)


@triton.jit
def levels_of(words, signs, CODE: tl.constexpr, PTX: tl.constexpr):
    """Levels divided by `unit_of`, float16 ``[rows, columns]`` in the order of `element`.

    Args:
        words: ``[rows, words]`` int32.
        signs: The sign words of LM3 as int32, 16 bits each; unread for other codes.
        CODE: Number of the code.
        PTX: Whether NVIDIA's instructions may be used.
    """
    pairs = words if CODE == 16 else _halves(_level_bytes(words, signs, 0, CODE, PTX))
    if CODE <= 4:
        pairs = tl.join(pairs, _halves(_level_bytes(words, signs, 1, CODE, PTX)))
    if CODE < 4:
        third = _halves(_level_bytes(words, signs, 2, CODE, PTX))
        pairs = tl.join(pairs, tl.join(third, _halves(_level_bytes(words, signs, 3, CODE, PTX))))
    parts = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    parts = tl.reshape(parts, [words.shape[0], words.shape[1] * elements_of(CODE)])
    if CODE == 16:
        return parts.to(tl.bfloat16, bitcast=True).to(tl.float16)
    return parts.to(tl.float16, bitcast=True)


@triton.jit
def load_tile(section, part, exists, N: tl.constexpr, SHAPE: tl.constexpr):
    """All that attention needs of N tokens of a section, as it lies in memory.

    Args:
        section: First byte of the section.
        part: Which of the page's tiles of N tokens.
        exists: Scalar; where false nothing is read.
        N: Tokens in a tile.
        SHAPE: The page, a `PageShape`.

    Returns:
        Words and sign words of keys ``[N, words]`` and of values ``[tile_dim, words]`` as int32, scales of
        keys and of values ``[N]`` and the centre ``[tile_dim]`` in float16. Rows stand in the order of
        `tile_slots`, channels of the centre in that of `element`. Slots never written may give anything.
    """
    K_E: tl.constexpr = elements_of(SHAPE.key_code)
    V_E: tl.constexpr = elements_of(SHAPE.value_code)
    K_WIDTH: tl.constexpr = SHAPE.head_dim // K_E
    o_slot = tile_slots(part, N, SHAPE)
    o_kword = tl.arange(0, SHAPE.tile_dim // K_E)
    o_keys = o_slot[:, None] * K_WIDTH + o_kword[None, :]
    m_keys = (o_kword < K_WIDTH)[None, :] & exists
    k_words, k_signs = _load_words(section, o_keys, m_keys, SHAPE.key_words, SHAPE.key_signs, SHAPE.key_code)
    o_d = tl.arange(0, SHAPE.tile_dim)
    o_vword = part * (N // V_E) + tl.arange(0, N // V_E)
    o_values = o_vword[None, :] * SHAPE.head_dim + o_d[:, None]
    m_values = (o_d < SHAPE.head_dim)[:, None] & exists
    v_words, v_signs = _load_words(
        section, o_values, m_values, SHAPE.value_words, SHAPE.value_signs, SHAPE.value_code
    )
    k_scales = _load_scales(section, o_slot, exists, SHAPE.key_scales, SHAPE.key_code)
    v_scales = _load_scales(section, o_slot, exists, SHAPE.value_scales, SHAPE.value_code)
    if SHAPE.centered:
        p_center = (section + SHAPE.key_center).to(tl.pointer_type(tl.float16))
        m_center = (o_d // K_E < K_WIDTH) & exists
        center = tl.load(p_center + element(o_d, SHAPE.head_dim, SHAPE.key_code), mask=m_center, other=0.0)
    else:
        center = tl.zeros(o_d.shape, dtype=tl.float16)
    return k_words, k_signs, v_words, v_signs, k_scales, v_scales, center


@triton.jit
def tile_slots(part, N: tl.constexpr, SHAPE: tl.constexpr):
    """Slot in its page of every row of a tile, in the order in which words of values hold tokens."""
    STEP: tl.constexpr = N // elements_of(SHAPE.value_code) * (2 if SHAPE.value_code == 16 else 4)
    return element(tl.arange(0, N), SHAPE.page_tokens, SHAPE.value_code) + part * STEP


@triton.jit
def _load_words(section, offsets, mask, WORDS: tl.constexpr, SIGNS: tl.constexpr, CODE: tl.constexpr):
    """Words that do not exist read as zeros, whose levels are finite; codes other than LM3 get no signs."""
    words = tl.load((section + WORDS).to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0)
    if CODE == 3:
        p_signs = (section + SIGNS).to(tl.pointer_type(tl.uint16))
        signs = tl.load(p_signs + offsets, mask=mask, other=0).to(tl.int32)
    else:
        signs = tl.zeros(words.shape, dtype=tl.int32)
    return words, signs


@triton.jit
def _load_scales(section, slots, exists, SCALES: tl.constexpr, CODE: tl.constexpr):
    if CODE <= 8:
        p_scales = (section + SCALES).to(tl.pointer_type(tl.float16))
        scales = tl.load(p_scales + slots, mask=(slots >= 0) & exists, other=1.0)
    else:
        scales = tl.full(slots.shape, 1.0, dtype=tl.float16)
    return scales
