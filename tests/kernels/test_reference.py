"""Quantize and dequantize on every shape, dtype and size of numbers that engines may bring."""

import itertools

import pytest
import torch

from tq_kernels import PRESETS, Code, CodecSpec, KeyCenter, PageLayout, preset, reference
from tq_kernels.codebook import LEVELS, VALUE_GAINS, midpoints
from tq_kernels.reference import (
    dequantize,
    level_table,
    nearest_indices,
    quantize,
    read_key_center,
    read_side,
    roundtrip,
)

from . import page_document
from .prediction import norm_corrected_distortion
from .tolerances import FP16_SUBNORMAL, LENGTH, UNIT_ROUNDOFF, rotation_error

ROTATED = [name for name, spec in PRESETS.items() if spec.key.rotated]
ROTATED_CODES = [Code.LM2, Code.LM3, Code.LM4, Code.E4M3_SCALED]
CPU = torch.device("cpu")


def _layout(name: str, head_dim: int = 64, heads: int = 2, page_tokens: int = 16) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=heads, page_tokens=page_tokens)


def _uncentred(code: Code, head_dim: int = 64, page_tokens: int = 16) -> PageLayout:
    spec = CodecSpec(key=code, value=code)
    return PageLayout(spec=spec, head_dim=head_dim, num_kv_heads=1, page_tokens=page_tokens)


def _tokens(layout: PageLayout, pages: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages * layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _read_by_document(page: torch.Tensor, layout: PageLayout, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    section = page[head * layout.section_bytes : (head + 1) * layout.section_bytes].numpy().tobytes()
    spec = layout.spec
    sides = page_document.read_section(
        section,
        spec.key.name,
        spec.value.name,
        bool(spec.key_center),
        layout.head_dim,
        layout.page_tokens,
        spec.rotation_seed,
    )
    keys, values = (torch.tensor(side, dtype=torch.float64) for side in sides)
    return keys, values


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "page_tokens"),
    [
        ("tq4", 80, 3, 16),
        ("tq4", 16, 1, 48),
        ("tq3", 96, 1, 32),
        ("tq2", 128, 1, 16),
        ("k8v4", 64, 2, 48),
        ("k3v2", 48, 1, 80),
        ("fp8", 112, 1, 16),
        ("raw", 48, 2, 16),
    ],
)
def test_pages_of_any_geometry_read_as_documented(
    name: str, head_dim: int, heads: int, page_tokens: int, generator: torch.Generator
) -> None:
    layout = _layout(name, head_dim, heads, page_tokens)
    pages = quantize(*_tokens(layout, 2, generator), layout)
    restored = [side.unflatten(0, (2, page_tokens)).double() for side in dequantize(pages, layout)]
    for page, head in itertools.product(range(2), range(heads)):
        for side, exact in zip(restored, _read_by_document(pages[page], layout, head), strict=True):
            bound = rotation_error(head_dim) * torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
            assert ((side[page, :, head] - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_depends_on_its_own_tokens_and_heads_alone(name: str, generator: torch.Generator) -> None:
    layout, one_head = _layout(name, heads=3), _layout(name, heads=1)
    keys, values = _tokens(layout, 4, generator)
    pages = quantize(keys, values, layout)
    for page in range(4):
        tokens = slice(page * 16, page * 16 + 16)
        assert torch.equal(quantize(keys[tokens], values[tokens], layout)[0], pages[page])
        for head in range(3):
            alone = quantize(keys[tokens, head : head + 1], values[tokens, head : head + 1], one_head)[0]
            section = slice(head * layout.section_bytes, (head + 1) * layout.section_bytes)
            assert torch.equal(pages[page, section], alone)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_what_their_float32_would_be(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    layout = _layout(name)
    keys, values = (side.to(dtype) for side in _tokens(layout, 2, generator))
    pages = quantize(keys, values, layout)

    assert torch.equal(pages, quantize(keys.float(), values.float(), layout))
    for half, full in zip(dequantize(pages, layout, dtype), dequantize(pages, layout), strict=True):
        assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("name", PRESETS)
def test_strides_do_not_matter(name: str, generator: torch.Generator) -> None:
    layout = _layout(name)
    keys, values = _tokens(layout, 2, generator)
    expected = quantize(keys, values, layout)
    head_major = [side.transpose(0, 1).contiguous().transpose(0, 1) for side in (keys, values)]
    interleaved = torch.stack((keys, values), dim=-1)

    assert torch.equal(quantize(*head_major, layout), expected)
    assert torch.equal(quantize(interleaved[..., 0], interleaved[..., 1], layout), expected)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("balanced", [False, True])
def test_a_roundtrip_without_bytes_gives_what_pages_give(
    name: str, balanced: bool, generator: torch.Generator
) -> None:
    layout = _layout(name, head_dim=80)
    keys, values = _tokens(layout, 3, generator)
    balance = torch.rand(2, 80, generator=generator) + 0.5 if balanced else None
    read = dequantize(quantize(keys, values, layout, key_balance=balance), layout, key_balance=balance)
    for side, expected in zip(roundtrip(keys, values, layout, key_balance=balance), read, strict=True):
        assert torch.equal(side, expected)
    with pytest.raises(ValueError, match="not whole pages"):
        roundtrip(keys[1:], values[1:], layout)


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_gives_no_pages(name: str) -> None:
    layout = _layout(name)
    nothing = torch.zeros(0, 2, 64)
    pages = quantize(nothing, nothing, layout)

    assert pages.shape == (0, layout.page_bytes)
    assert [side.shape for side in dequantize(pages, layout)] == [(0, 2, 64)] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_zeros_come_back_as_zeros(name: str, generator: torch.Generator) -> None:
    """A page of them, and a value among others; a zero key among others is not zero after the centre."""
    layout = _layout(name)
    nothing = torch.zeros(16, 2, 64)
    for side in dequantize(quantize(nothing, nothing, layout), layout):
        assert torch.equal(side, nothing)
    keys, values = _tokens(layout, 1, generator)
    values[3] = 0
    _, restored = dequantize(quantize(keys, values, layout), layout)
    assert torch.equal(restored[3], torch.zeros(2, 64))
    assert (restored[4] != 0).any()


@pytest.mark.parametrize("code", ROTATED_CODES)
def test_zero_vectors_have_index_and_scale_zero(code: Code) -> None:
    indices, scales = nearest_indices(torch.zeros(2, 64), code)

    assert scales is not None
    assert not indices.any()
    assert not scales.any()


@pytest.mark.parametrize("name", ROTATED)
def test_equal_keys_come_back_from_the_centre(name: str, generator: torch.Generator) -> None:
    """A page of one key has nothing left after its centre; only fp16 rounds it."""
    layout = _layout(name)
    key = torch.randn(1, 2, 64, generator=generator).expand(16, 2, 64)
    keys, _ = dequantize(quantize(key, key, layout), layout)
    bound = UNIT_ROUNDOFF[torch.float16] * torch.linalg.vector_norm(key, dim=-1, keepdim=True)

    assert (torch.linalg.vector_norm(keys - key, dim=-1, keepdim=True) <= bound).all()


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("size", [1e4, 1e-2])
def test_large_and_small_numbers_distort_as_others(
    name: str, size: float, generator: torch.Generator
) -> None:
    layout = _layout(name, page_tokens=64)
    unit = _tokens(layout, 16, generator)
    scaled = dequantize(quantize(unit[0] * size, unit[1] * size, layout, search=False), layout)
    for plain, restored, code in zip(unit, scaled, (layout.spec.key, layout.spec.value), strict=True):
        relative = float(((restored / size - plain) ** 2).sum() / (plain**2).sum())
        assert relative == pytest.approx(norm_corrected_distortion(code, 64), rel=0.05)


@pytest.mark.parametrize("name", ROTATED)
def test_tiny_numbers_lose_at_most_what_fp16_cannot_hold(name: str, generator: torch.Generator) -> None:
    """At 1e-6 scales are subnormal fp16 and err by 2^-25, times the length of the levels; so do centres."""
    layout = _layout(name)
    sides = [1e-6 * side for side in _tokens(layout, 8, generator)]
    restored = dequantize(quantize(*sides, layout), layout)
    for plain, back, code in zip(sides, restored, (layout.spec.key, layout.spec.value), strict=True):
        length = 2.0 * 24.5 * 8 if code is Code.E4M3_SCALED else LEVELS[code][-1] * 8
        codebook = 1.5 * norm_corrected_distortion(code, 64) ** 0.5 * torch.linalg.vector_norm(plain, dim=-1)
        error = torch.linalg.vector_norm(back - plain, dim=-1)
        assert (error <= codebook + FP16_SUBNORMAL * (length + 8)).all()


@pytest.mark.parametrize("name", ROTATED)
def test_numbers_beyond_fp16_saturate_and_stay_finite(name: str) -> None:
    """Neither the centre nor a scale may become infinite: one such token would make a page of NaN."""
    layout = _layout(name)
    vectors = torch.zeros(16, 2, 64)
    vectors[..., 0] = 1e9
    for side in dequantize(quantize(vectors, vectors, layout), layout):
        assert side.isfinite().all()
        assert torch.linalg.vector_norm(side, dim=-1).min() > 65504


def test_fp8_saturates_as_engines_do() -> None:
    layout = _layout("fp8")
    vectors = torch.tensor([1e4, -1e4, 448.0, 464.1, 0.0, -0.0, 2.0**-10, 0.3] * 8).expand(16, 2, 64)
    keys, values = dequantize(quantize(vectors, vectors, layout), layout)
    expected = torch.tensor([448.0, -448.0, 448.0, 448.0, 0.0, -0.0, 0.0, 0.3125] * 8).expand(16, 2, 64)

    assert torch.equal(keys, expected)
    assert torch.equal(values, expected)


def test_raw_is_exactly_bfloat16(generator: torch.Generator) -> None:
    layout = _layout("raw")
    keys, values = _tokens(layout, 2, generator)
    for side, restored in zip(
        (keys, values), dequantize(quantize(keys, values, layout), layout), strict=True
    ):
        assert torch.equal(restored, side.bfloat16().float())


@pytest.mark.parametrize("name", PRESETS)
def test_every_byte_is_written_and_padding_is_zero(name: str, generator: torch.Generator) -> None:
    """Changing every input changes bytes all over the planes, and none in the padding."""
    layout = _layout(name, page_tokens=48)
    pages = torch.cat([quantize(*_tokens(layout, 32, generator), layout) for _ in range(2)])
    sections = pages.view(-1, layout.section_bytes)
    used = layout.planes[-1].offset + layout.planes[-1].num_bytes

    # pages of the unrotated presets are always full
    assert (used < layout.section_bytes) == layout.spec.key.rotated
    assert not sections[:, used:].any()
    assert (sections[:, :used] != sections[0, :used]).any(dim=0).all()


def test_pages_of_different_presets_differ(generator: torch.Generator) -> None:
    keys, values = _tokens(_layout("tq4"), 1, generator)
    pages = [quantize(keys, values, _layout(name))[0].numpy().tobytes() for name in PRESETS]
    other_seed = CodecSpec(key=Code.LM4, value=Code.LM4, key_center=KeyCenter.PAGE, rotation_seed=1)
    layout = PageLayout(spec=other_seed, head_dim=64, num_kv_heads=2, page_tokens=16)
    pages.append(quantize(keys, values, layout)[0].numpy().tobytes())

    assert len(set(pages)) == len(PRESETS) + 1


@pytest.mark.parametrize("code", ROTATED_CODES)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_reconstructions_are_as_long_as_their_vectors(
    code: Code, head_dim: int, generator: torch.Generator
) -> None:
    layout = _uncentred(code, head_dim)
    keys, values = _tokens(layout, 64, generator)
    for search in (False, True):
        pages = quantize(keys, values, layout, search=search)
        for side, restored in zip((keys, values), dequantize(pages, layout), strict=True):
            ratio = torch.linalg.vector_norm(restored, dim=-1) / torch.linalg.vector_norm(side, dim=-1)
            gain = VALUE_GAINS.get(code, 1.0) if search and side is values else 1.0
            assert (ratio / gain - 1).abs().max() < LENGTH


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
def test_a_magnitude_on_a_boundary_takes_the_upper_level(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal coordinates are all normalised to the target, exactly: make the boundary the target."""
    for rank, edge in enumerate(midpoints(LEVELS[code]), 1):
        monkeypatch.setitem(reference.TARGETS, code, edge)
        indices, _ = nearest_indices(torch.ones(1, 64), code, search=False)
        assert indices.unique().tolist() == [rank]


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
def test_every_coordinate_takes_its_nearest_level(code: Code, generator: torch.Generator) -> None:
    vectors = torch.randn(256, 128, generator=generator)
    indices, scales = nearest_indices(vectors, code, search=False)
    assert scales is not None
    target = {2: 26.4923, 3: 24.0839, 4: 17.4784}[code]
    unit = vectors * (target * 128**0.5 / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True))
    levels = level_table(code, CPU)
    best = (unit[..., None] - levels).abs().min(dim=-1).values

    torch.testing.assert_close((unit - levels[indices]).abs(), best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_second_generation_without_a_centre_changes_no_byte(
    code: Code, head_dim: int, generator: torch.Generator
) -> None:
    """Values always, keys of specs without a centre.

    A reconstruction is s L with |s L| the original length, so it is normalised to L t sqrt(d) / |L|. The
    factor t sqrt(d) / |L| lies between 1 / (1 + sqrt(D)) and 1 / (1 - sqrt(D)), where D is the vector's
    distortion without norm correction, and no level is that near to its boundary: the same indices, hence the
    same |L| and, as s is an fp16 number, the same scale.
    """
    layout = _uncentred(code, head_dim)
    first = quantize(*_tokens(layout, 64, generator), layout)

    assert torch.equal(quantize(*dequantize(first, layout), layout), first)


def test_a_second_generation_of_8_bit_codes_changes_only_what_is_almost_zero(
    generator: torch.Generator,
) -> None:
    """Levels near zero are 2^-9 apart, and minus zero comes back as either zero."""
    layout = _uncentred(Code.E4M3_SCALED)
    first = quantize(*_tokens(layout, 64, generator), layout)
    second = quantize(*dequantize(first, layout), layout)
    levels, scales = zip(read_side(first, layout, "value"), read_side(second, layout, "value"), strict=True)

    assert torch.equal(*scales)
    assert (levels[0] - levels[1]).abs().max() <= 2.0**-9
    assert float((levels[0] != levels[1]).float().mean()) < 1e-4


@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2"])
def test_generations_of_centred_keys_drift_by_the_mean_error_of_the_page(
    name: str, generator: torch.Generator
) -> None:
    """Indices and values stay; the centre moves, every time, by the mean of the page's errors.

    That mean m has 1 / P of the error's energy and is part of every token's error e, so after n generations
    |e + n m|^2 is (1 + (n^2 + 2 n) / P) |e|^2 on average: 5 % for one at P = 64, and 37 % for four. Pages are
    to be moved, not made again.
    """
    page_tokens = 64
    layout = _layout(name, head_dim=128, heads=1, page_tokens=page_tokens)
    keys, values = _tokens(layout, 32, generator)
    first = quantize(keys, values, layout)
    pages = first
    keys_1, values_1 = dequantize(first, layout)
    before = float(((keys_1 - keys) ** 2).mean())
    for generation in range(1, 5):
        pages = quantize(*dequantize(pages, layout), layout)
        keys_n, values_n = dequantize(pages, layout)
        growth = float(((keys_n - keys) ** 2).mean()) / before - 1

        assert torch.equal(read_side(pages, layout, "key")[0], read_side(first, layout, "key")[0])
        assert torch.equal(values_n, values_1)
        assert growth == pytest.approx((generation**2 + 2 * generation) / page_tokens, rel=0.1)


def test_centre_is_the_mean_of_the_page(generator: torch.Generator) -> None:
    layout = _layout("tq4", heads=2)
    keys, values = _tokens(layout, 3, generator)
    center = read_key_center(quantize(keys + 5, values, layout), layout)
    assert center is not None
    rotation = torch.tensor(page_document.rotation_rows(64, layout.spec.rotation_seed))
    exact = (keys + 5).unflatten(0, (3, 16)).mean(dim=1) @ rotation.T

    torch.testing.assert_close(center, exact, atol=2e-3, rtol=UNIT_ROUNDOFF[torch.float16])
    assert read_key_center(quantize(keys[:16], values[:16], _layout("raw")), _layout("raw")) is None


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (
            (16, 2, 64),
            (32, 2, 64),
            r"must both be \[num_tokens, 2, 64\], not \[16, 2, 64\] and \[32, 2, 64\]",
        ),
        ((16, 1, 64), (16, 1, 64), r"must both be \[num_tokens, 2, 64\], not \[16, 1, 64\]"),
        ((16, 2, 128), (16, 2, 128), r"must both be \[num_tokens, 2, 64\], not \[16, 2, 128\]"),
        ((16, 128), (16, 128), r"must both be \[num_tokens, 2, 64\], not \[16, 128\]"),
        ((20, 2, 64), (20, 2, 64), "20 tokens are not whole pages of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    keys: tuple[int, ...], values: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(keys), torch.zeros(values), _layout("tq4"))


def test_pages_of_another_size_or_dtype_are_refused() -> None:
    layout = _layout("tq4")
    for pages in (
        torch.zeros(1, 2 * layout.page_bytes, dtype=torch.uint8),
        torch.zeros(layout.page_bytes, dtype=torch.uint8),
        torch.zeros(1, layout.page_bytes, dtype=torch.int8),
    ):
        with pytest.raises(ValueError, match=rf"pages must be \[num_pages, {layout.page_bytes}\] uint8"):
            dequantize(pages, layout)


def test_constants_first_used_in_inference_mode_serve_training_too(generator: torch.Generator) -> None:
    layout = PageLayout(spec=preset("tq3"), head_dim=48, num_kv_heads=1, page_tokens=16)
    keys = torch.randn(16, 1, 48, generator=generator)
    with torch.inference_mode():
        dequantize(quantize(keys, keys, layout), layout)
    weighted = keys * torch.ones(1, requires_grad=True)
    quantize(weighted, weighted, layout)
