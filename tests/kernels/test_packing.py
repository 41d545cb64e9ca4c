"""Packing is bit-exact, uses every bit once, and is undone by the few instructions that kernels use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_kernels.codebook import LEVELS
from tq_kernels.layout import WORD_FORMATS
from tq_kernels.packing import pack, unpack
from tq_kernels.reference import level_table
from tq_kernels.spec import Code

from . import page_document

CODES = list(Code)
MASK32 = (1 << 32) - 1


def _pack(indices: list[int], code: Code) -> tuple[list[int], list[int]]:
    words, signs = pack(torch.tensor(indices, dtype=torch.int32), code)
    unsigned = [word & MASK32 for word in words.tolist()]
    return unsigned, [0] * len(words) if signs is None else [sign & 0xFFFF for sign in signs.tolist()]


@st.composite
def _axes(draw: st.DrawFn) -> tuple[Code, list[int]]:
    code = draw(st.sampled_from(CODES))
    size = WORD_FORMATS[code].elements * draw(st.integers(1, 5))
    index = st.integers(0, (1 << code.bits) - 1)
    return code, draw(st.lists(index, min_size=size, max_size=size))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(_axes())
def test_packing_is_what_the_document_says_and_can_be_undone(axis: tuple[Code, list[int]]) -> None:
    code, indices = axis
    words, signs = _pack(indices, code)

    assert (words, signs) == page_document.pack_axis(indices, code.name)
    assert page_document.unpack_axis(words, signs, code.name) == indices
    assert unpack(*pack(torch.tensor(indices), code), code).tolist() == indices


@pytest.mark.parametrize("code", CODES)
def test_every_index_survives_at_every_place(code: Code) -> None:
    elements = WORD_FORMATS[code].elements
    values = torch.arange(1 << code.bits, dtype=torch.int32)
    rows = torch.stack([values.roll(shift) for shift in range(2 * elements)], dim=-1)

    assert torch.equal(unpack(*pack(rows, code), code), rows)


@pytest.mark.parametrize("code", CODES)
def test_every_bit_of_every_word_is_used_once(code: Code) -> None:
    size = 3 * WORD_FORMATS[code].elements
    seen = []
    for element in range(size):
        for bit in range(code.bits):
            indices = [0] * size
            indices[element] = 1 << bit
            words, signs = _pack(indices, code)
            set_bits = [("words", i, b) for i, b in _set_bits(words)]
            set_bits += [("signs", i, b) for i, b in _set_bits(signs)]
            assert len(set_bits) == 1, "one bit of an index is one bit of a word"
            seen += set_bits
    total = [("words", i, b) for i in range(3) for b in range(32)]
    if code is Code.LM3:
        total += [("signs", i, b) for i in range(3) for b in range(16)]

    assert sorted(seen) == sorted(total)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_dtype_and_any_strides(
    code: Code, dtype: torch.dtype, generator: torch.Generator
) -> None:
    high = min(1 << code.bits, torch.iinfo(dtype).max + 1)
    indices = torch.randint(high, (3, 96, 5), generator=generator).to(dtype).transpose(1, 2)
    words, signs = pack(indices, code)

    assert torch.equal(unpack(words, signs, code), indices.to(torch.int32))
    one_by_one = [pack(row, code)[0] for plane in indices for row in plane]
    assert torch.equal(words.reshape(len(one_by_one), -1), torch.stack(one_by_one))


@pytest.mark.parametrize("code", CODES)
def test_a_part_of_a_word_is_refused(code: Code) -> None:
    elements = WORD_FORMATS[code].elements
    with pytest.raises(
        ValueError, match=f"an axis of {elements + 1} elements does not fill words of {elements}"
    ):
        pack(torch.zeros(elements + 1, dtype=torch.int32), code)


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
def test_kernel_recipes_decode_to_the_same_levels(code: Code, generator: torch.Generator) -> None:
    """And, byte permute, and: the plan for GPUs in plain integers, against the reference's levels."""
    form = WORD_FORMATS[code]
    size = 64 * form.elements
    indices = torch.randint(1 << code.bits, (size,), generator=generator)
    words, signs = _pack(indices.tolist(), code)
    expected = level_table(code, torch.device("cpu"))[indices].tolist()
    decoded: list[float | None] = [None] * size
    for u, (word, sign_word) in enumerate(zip(words, signs, strict=True)):
        for group in range(form.groups):
            four_bytes = _four_levels(word, sign_word, group, code)
            for lane in range(4):
                element = group * (size // form.groups) + 4 * u + lane
                decoded[element] = page_document.e4m3(four_bytes >> 8 * lane & 0xFF)

    assert decoded == expected


def _set_bits(numbers: list[int]) -> list[tuple[int, int]]:
    return [(i, bit) for i, number in enumerate(numbers) for bit in range(32) if number >> bit & 1]


def _four_levels(word: int, sign_word: int, group: int, code: Code) -> int:
    """Four e4m3 bytes in a 32-bit integer."""
    table = [_e4m3_byte(level) for level in LEVELS[code]]
    if code is Code.LM4:
        magnitude = _prmt(table, word >> 16 * group & 0x7777)
        sign = word << 4 * group & 0x80808080
    elif code is Code.LM3:
        magnitude = _prmt(table, word >> (0, 2, 16, 18)[group] & 0x3333)
        sign = (sign_word * 0x100001 & MASK32) << group & 0x80808080
    else:
        base, delta = table[0] * 0x01010101, table[1] - table[0]
        magnitude = ((word >> group & 0x01010101) * delta + base) & MASK32
        sign = word << group & 0x80808080
    return magnitude | sign


def _prmt(table: list[int], selectors: int) -> int:
    """NVIDIA's byte permute: nibble i of the low 16 bits of `selectors` picks byte i of the result."""
    assert not selectors & 0x8888, "bit 3 of a selector would replicate signs"
    return sum(table[selectors >> 4 * i & 7] << 8 * i for i in range(4))


def _e4m3_byte(level: float) -> int:
    return next(byte for byte in range(127) if page_document.e4m3(byte) == level)


def test_documented_constants_of_the_two_bit_recipe() -> None:
    assert [_e4m3_byte(level) for level in LEVELS[Code.LM2]] == [0x54, 0x62]
    assert "* (0x62 - 0x54) + 0x54545454)" in page_document.SECTION
