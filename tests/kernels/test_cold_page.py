"""Cold pages have the size they promise, half the error of LM pages of that size, and survive anything."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_kernels import PageLayout, cold_page, cold_search, preset, reference
from tq_kernels.cold_layout import HEADER_FIELDS, ColdLayout, section_bytes_for
from tq_kernels.cold_page import dequantize, quantize, read_levels, roundtrip
from tq_kernels.cold_sections import field_of, symbols_of, write_sections
from tq_kernels.entropy import pack

from .hard_inputs import HARD_INPUTS, hard_input
from .tolerances import COLD_DISTORTION, COLD_DRIFT

PAGE_TOKENS = 128


def layout_for(bits: float, head_dim: int = 64, heads: int = 2, page_tokens: int = PAGE_TOKENS) -> ColdLayout:
    return ColdLayout(
        head_dim=head_dim,
        num_kv_heads=heads,
        page_tokens=page_tokens,
        section_bytes=section_bytes_for(bits, head_dim, page_tokens),
    )


def gaussian(
    layout: ColdLayout, generator: torch.Generator, pages: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages * layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def relative_error(original: torch.Tensor, restored: torch.Tensor) -> float:
    return float(((original - restored) ** 2).sum() / (original**2).sum())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", COLD_DISTORTION)
def test_gaussian_vectors_distort_as_promised(bits: int, head_dim: int, generator: torch.Generator) -> None:
    """At this rate of indices; the step search may not have spent more."""
    layout = layout_for(bits, head_dim)
    keys, values = gaussian(layout, generator, pages=4)
    vectors, center = cold_page._vectors(keys, values, layout, None)
    budget = torch.full((len(vectors),), 1.0 * bits * vectors[0].numel())
    of_scales = cold_search.fill(vectors, budget, key_extra_bits=0).scales.bits()
    coded = cold_search.fill(vectors, budget + of_scales, key_extra_bits=0)
    restored = cold_page.restore(coded.levels, coded.scales, center.float(), layout, None)

    # a scale more or less on the next grid point is a bit or two
    assert torch.all(coded.bits - coded.scales.bits() <= 1.001 * budget)
    for original, side in zip((keys, values), restored, strict=True):
        assert relative_error(original, side) < COLD_DISTORTION[bits]


@pytest.mark.parametrize(
    ("name", "head_dim"), [("tq2", 64), ("tq3", 64), ("tq3", 128), ("tq4", 128), ("tq3", 256)]
)
def test_about_half_the_error_of_lm_pages_at_their_bytes(
    name: str, head_dim: int, generator: torch.Generator
) -> None:
    lm = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=2, page_tokens=PAGE_TOKENS)
    cold = ColdLayout(head_dim=head_dim, num_kv_heads=2, section_bytes=lm.section_bytes)
    keys, values = gaussian(cold, generator)
    pages = quantize(keys, values, cold, key_extra_bits=0)
    assert pages.shape == (1, lm.page_bytes)

    of_lm = reference.dequantize(reference.quantize(keys, values, lm), lm)
    ratio = {"tq2": 0.56, "tq3": 0.5, "tq4": 0.53}[name]
    for original, side, lm_side in zip((keys, values), dequantize(pages, cold), of_lm, strict=True):
        assert relative_error(original, side) < ratio * relative_error(original, lm_side)


@settings(max_examples=15, deadline=None)
@given(
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128]),
    heads=st.integers(1, 3),
    page_tokens=st.sampled_from([16, 32, 48, 64]),
    pages=st.integers(0, 2),
    bits=st.floats(1, 6),
    extra=st.floats(-2, 2),
    seed=st.integers(0, 2**16),
)
def test_bytes_carry_exactly_what_the_round_trip_says(
    head_dim: int, heads: int, page_tokens: int, pages: int, bits: float, extra: float, seed: int
) -> None:
    layout = layout_for(bits, head_dim, heads, page_tokens)
    generator = torch.Generator().manual_seed(seed)
    keys, values = gaussian(layout, generator, pages)
    balance = torch.rand(heads, head_dim, generator=generator) + 0.5
    written = quantize(keys, values, layout, key_balance=balance, key_extra_bits=extra)
    through_bytes = dequantize(written, layout, key_balance=balance)
    without = roundtrip(
        keys,
        values,
        section_bytes=layout.section_bytes,
        key_balance=balance,
        key_extra_bits=extra,
        page_tokens=page_tokens,
    )

    assert written.shape == (pages, layout.page_bytes)
    for one, other in zip(through_bytes, without, strict=True):
        assert torch.equal(one, other)


def test_heads_and_pages_are_coded_by_themselves(generator: torch.Generator) -> None:
    """A range of heads is a range of bytes; a page does not depend on its neighbours."""
    layout = layout_for(3, heads=3)
    keys, values = gaussian(layout, generator, pages=2)
    pages = quantize(keys, values, layout)
    alone = dataclasses.replace(layout, num_kv_heads=1)
    second = quantize(keys[PAGE_TOKENS:, 1:2], values[PAGE_TOKENS:, 1:2], alone)

    assert torch.equal(pages[1].view(3, -1)[1], second[0])


def test_more_bits_for_keys_are_less_for_values(generator: torch.Generator) -> None:
    layout = layout_for(3)
    keys, values = gaussian(layout, generator)
    equal, more = (
        [relative_error(*sides) for sides in zip((keys, values), restored, strict=True)]
        for restored in (
            roundtrip(keys, values, bits=3, key_extra_bits=0),
            roundtrip(keys, values, bits=3, key_extra_bits=1),
        )
    )
    # half a bit is a factor of two
    assert more[0] == pytest.approx(equal[0] / 2, rel=0.05)
    assert more[1] == pytest.approx(equal[1] * 2, rel=0.05)


def test_the_budget_is_used_and_never_exceeded(generator: torch.Generator) -> None:
    for bits in (1.0, 1.3, 2.5, 3.14, 5.0):
        layout = layout_for(bits)
        pages = quantize(*gaussian(layout, generator), layout)
        num_words = field_of(pages.view(-1, layout.section_bytes), "num_words").long()
        assert torch.all(num_words <= layout.max_words)
        # the search leaves 0.002 bits an index, a lane up to 16 bits
        assert torch.all(num_words >= layout.max_words * 0.995 - 10)


def test_a_section_that_turns_out_too_long_is_coded_again(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    layout = layout_for(2)
    keys, values = gaussian(layout, generator)
    exact = cold_page._budget_bits
    monkeypatch.setattr(cold_page, "_budget_bits", lambda *each: exact(*each) + 300)
    pages = quantize(keys, values, layout, key_extra_bits=0)

    assert relative_error(values, dequantize(pages, layout)[1]) < COLD_DISTORTION[2]


@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_hard_inputs_cost_little_more(kind: str, generator: torch.Generator) -> None:
    layout = layout_for(3, heads=1, page_tokens=16)
    vectors = hard_input(kind, 64, generator)[:, None]
    restored = roundtrip(vectors, vectors, bits=3, key_extra_bits=0, page_tokens=16)

    assert relative_error(vectors, restored[1]) < 1.5 * COLD_DISTORTION[3]
    assert layout.num_kv_heads == 1


def test_lengths_are_kept_and_zeros_are_zeros(generator: torch.Generator) -> None:
    layout = layout_for(3, heads=1)
    keys, values = gaussian(layout, generator)
    values *= torch.logspace(-3, 3, PAGE_TOKENS)[:, None, None]
    values[5] = 0
    restored = roundtrip(keys, values, bits=3)[1]
    lengths, restored_lengths = (torch.linalg.vector_norm(each, dim=-1) for each in (values, restored))

    assert not restored[5].any()
    # 20 octaves take 8 codes each
    ratio = torch.where(lengths > 0, restored_lengths / lengths, 1)
    assert float((ratio.log2().abs()).max()) <= 1 / 16 + 1e-3


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1.0, 1e4, 1e15])
def test_any_size_of_vector(size: float, generator: torch.Generator) -> None:
    """A centre beyond fp16 stays within it, and what is left of the keys is coded with them."""
    keys, values = gaussian(layout_for(3), generator)
    keys_hat, values_hat = roundtrip(size * keys, size * values, bits=3, key_extra_bits=0)
    for original, side in ((size * keys, keys_hat), (size * values, values_hat)):
        assert side.isfinite().all()
        if size >= 1e-6:
            assert relative_error(original.double(), side.double()) < COLD_DISTORTION[3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_numbers_that_cannot_be_coded_are_refused(bad: float, generator: torch.Generator) -> None:
    layout = layout_for(3)
    keys, values = gaussian(layout, generator)
    values[3, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize(keys, values, layout)


def test_one_vector_like_no_other(generator: torch.Generator) -> None:
    """On one channel after the rotation: beyond every table, so its last level and its length must do."""
    layout = layout_for(3, head_dim=128, heads=1)
    keys, values = gaussian(layout, generator)
    values[7, 0] = cold_page.rotation_matrix(128, layout.rotation_seed)[9]
    restored = roundtrip(keys, values, bits=3, key_extra_bits=0)[1]

    assert relative_error(values[7], restored[7]) < 0.5
    assert relative_error(values[8:], restored[8:]) < COLD_DISTORTION[3]


def test_vectors_of_equal_coordinates_fill_the_budget_too(generator: torch.Generator) -> None:
    """All coordinates plus or minus one after the rotation: no rate is right beforehand."""
    layout = layout_for(2, heads=1)
    signs = torch.randint(0, 2, (PAGE_TOKENS, 1, 64), generator=generator) * 2.0 - 1
    vectors = signs @ cold_page.rotation_matrix(64, layout.rotation_seed)
    restored = dequantize(quantize(vectors, vectors, layout, key_extra_bits=0), layout)[1]

    assert relative_error(vectors, restored) < COLD_DISTORTION[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_was_loaded_is_saved_as_the_same_bytes(bits: int, generator: torch.Generator) -> None:
    """A restored vector is a path already, its scale on the grid and the mean of its page where it was."""
    layout = layout_for(bits)
    keys, values = gaussian(layout, generator)
    keys += 5 * torch.randn(keys.shape[1:], generator=generator)
    pages = quantize(keys, values, layout)

    assert torch.equal(quantize(*dequantize(pages, layout), layout), pages)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_bfloat16_cache_between_generations_does_not_drift(bits: int, generator: torch.Generator) -> None:
    """Rounding moves a centre a little, no level."""
    keys, values = gaussian(layout_for(bits), generator)
    keys += 5 * torch.randn(keys.shape[1:], generator=generator)
    sides = first = roundtrip(keys, values, bits=bits)
    for _ in range(4):
        sides = roundtrip(*(side.bfloat16() for side in sides), bits=bits)

    assert torch.equal(sides[1], first[1])
    once, often = (float(((keys - side) ** 2).sum()) for side in (first[0], sides[0]))
    assert often < COLD_DRIFT * once


def test_every_damaged_byte_is_refused_or_harmless(generator: torch.Generator) -> None:
    layout = layout_for(1, head_dim=16, heads=1, page_tokens=16)
    page = quantize(*gaussian(layout, generator), layout)
    refused = 0
    for place in range(layout.page_bytes):
        damaged = page.clone()
        damaged[0, place] ^= 1 << (place % 8)
        try:
            sides = dequantize(damaged, layout)
        except ValueError:
            refused += 1
            continue
        assert all(side.isfinite().all() for side in sides)
    assert refused > layout.page_bytes // 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.booleans())
def test_any_bytes_are_refused_or_finite(seed: int, zeros: bool) -> None:
    layout = layout_for(1.5, head_dim=16, heads=2, page_tokens=16)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randint(0, 256, (2, layout.page_bytes), generator=generator, dtype=torch.uint8)
    if zeros:
        pages *= torch.rand(pages.shape, generator=generator) < 0.05
    with pytest.raises(ValueError, match="damaged"):
        dequantize(pages, layout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_words", 0xFFFF),
        ("version", 2),
        ("reserved", 1),
        ("key_table", 19),
        ("value_table", 255),
        ("key_octave", 2),
        ("value_octave", 6),
        ("key_scale_table", 6),
        ("value_scale_table", 9),
        ("key_top", 1601),
        ("value_top", -3201),
    ],
)
def test_header_fields_out_of_range_are_refused(name: str, value: int, generator: torch.Generator) -> None:
    layout = layout_for(2, heads=2, page_tokens=16)
    pages = quantize(*gaussian(layout, generator, pages=2), layout)
    field = field_of(pages.view(-1, layout.section_bytes), name)
    field[3] = value - 0x10000 if name == "num_words" else value
    with pytest.raises(ValueError, match="head 1 of cold page 1 is damaged"):
        read_levels(pages, layout)


def test_bytes_beyond_the_words_must_be_zeros(generator: torch.Generator) -> None:
    layout = layout_for(2, heads=1, page_tokens=16)
    roomy = dataclasses.replace(layout, section_bytes=layout.section_bytes + 40)
    keys, values = gaussian(layout, generator)
    page = quantize(keys, values, layout)
    longer = torch.cat((page, torch.zeros(1, 40, dtype=torch.uint8)), 1)
    assert torch.equal(dequantize(longer, roomy)[0], dequantize(page, layout)[0])

    longer[0, -1] = 1
    with pytest.raises(ValueError, match="damaged"):
        dequantize(longer, roomy)


def test_pages_of_another_shape_are_refused(generator: torch.Generator) -> None:
    layout = layout_for(2, page_tokens=16)
    keys, values = gaussian(layout, generator)
    for arguments in ((keys[:, :1], values[:, :1]), (keys[0], values[0]), (keys, values[:0])):
        with pytest.raises(ValueError, match="must both be"):
            quantize(*arguments, layout)
    with pytest.raises(ValueError, match="not whole pages"):
        quantize(keys[:-1], values[:-1], layout)
    with pytest.raises(ValueError, match="uint8"):
        dequantize(torch.zeros(1, layout.page_bytes - 1, dtype=torch.uint8), layout)
    with pytest.raises(ValueError, match="either bits or section_bytes"):
        roundtrip(keys, values, page_tokens=16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head_dim": 56}, "head_dim"),
        ({"head_dim": 112}, "head_dim"),
        ({"head_dim": 512}, "head_dim"),
        ({"page_tokens": 24}, "page_tokens"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"section_bytes": 6002}, "multiple of 4"),
        ({"section_bytes": 200}, "section_bytes"),
        ({"section_bytes": 1 << 20}, "section_bytes"),
        ({"rotation_seed": -1}, "rotation_seed"),
    ],
)
def test_layouts_that_cannot_be_are_refused(change: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(layout_for(3), **change)


def test_header_fields_follow_each_other() -> None:
    offset = 0
    for place, code in HEADER_FIELDS.values():
        assert place == offset
        offset += {"B": 1, "H": 2, "h": 2}[code]
    assert offset == layout_for(3).center_offset


GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LAYOUT = layout_for(3, page_tokens=32)
GOLDEN_SHA256 = {
    "page": "f02e1838868f628de14da7c2ab2cbaa557b97e387dc09ecd87fc41710ae0b1f1",
    "levels": "95a35ea066af25f015024c362f3d7e6e93ef2ddbe145615bc1b4bd4fe1c6e4ac",
    "codes": "2727cf26c832b6acba84ca4aa44517221e9d365d7853fea4d825738a13154f8c",
    "centers": "4370af184b4d5d94cea6fe57e5a180e95c978541d5630af993577441736c229f",
}
"""Never change a line: `golden/README.md`."""


def golden_page() -> torch.Tensor:
    return torch.frombuffer(bytearray((GOLDEN / "cold" / "page.bin").read_bytes()), dtype=torch.uint8)[None]


def test_golden_page_reads_exactly_as_it_did() -> None:
    levels, scales, center = read_levels(golden_page(), GOLDEN_LAYOUT)
    found = {
        "page": golden_page(),
        "levels": levels,
        "codes": scales.codes.to(torch.uint8),
        "centers": center.to(torch.float16),
    }

    for name, integers in found.items():
        assert hashlib.sha256(integers.contiguous().numpy().tobytes()).hexdigest() == GOLDEN_SHA256[name], (
            name
        )


def test_golden_integers_are_packed_into_the_golden_page() -> None:
    levels, scales, center = read_levels(golden_page(), GOLDEN_LAYOUT)
    sections = golden_page().view(-1, GOLDEN_LAYOUT.section_bytes)
    tables = torch.stack([field_of(sections, f"{side}_table").long() for side in ("key", "value")], 1)
    coded = cold_search.CodedSections(levels, tables, scales, scales.bits())
    packed = pack(*symbols_of(coded))
    written = write_sections(coded, center.to(torch.float16), *packed, GOLDEN_LAYOUT)

    assert torch.equal(written.view(1, -1), golden_page())


def test_golden_page_is_made_of_the_golden_inputs() -> None:
    numbers = torch.frombuffer(bytearray((GOLDEN / "inputs.bin").read_bytes()), dtype=torch.float32)
    keys, values = numbers.view(2, 32, 2, 64)
    keys_hat, values_hat = dequantize(golden_page(), GOLDEN_LAYOUT)
    again = roundtrip(
        keys, values, section_bytes=GOLDEN_LAYOUT.section_bytes, key_extra_bits=0, page_tokens=32
    )

    for original, side, new in zip((keys, values), (keys_hat, values_hat), again, strict=True):
        assert relative_error(original, side) == pytest.approx(relative_error(original, new), rel=0.01)
