"""The codec distorts as much as theory says: on Gaussian input, and little more on hard inputs.

Theory speaks of nearest levels; what the search for a better cell size takes off is tested at the end.
"""

import dataclasses
import math

import pytest
import torch

from tq_kernels import PRESETS, Code, CodecSpec, KeyCenter, PageLayout, preset
from tq_kernels.codebook import TARGETS, distortion, e4m3_levels
from tq_kernels.reference import dequantize, level_table, nearest_indices, quantize
from tq_kernels.spec import DEFAULT_ROTATION_SEED

from .hard_inputs import HARD_INPUTS, hard_input
from .prediction import exact_search, norm_corrected_distortion, positive_levels
from .tolerances import DISTORTION, HARD_INPUT, SEARCH, SEARCH_GAIN, SIGMAS

ROTATED = [name for name, spec in PRESETS.items() if spec.key.rotated]
ROTATED_CODES = [Code.LM2, Code.LM3, Code.LM4, Code.E4M3_SCALED]
HEAD_DIMS = [64, 80, 96, 128, 256]
PAGE_TOKENS = 64
GAUSSIAN_COORDINATES = 1_750_000
"""Makes 1 % at least four standard errors for every code, as the tests check."""

CASES = [(name, head_dim) for name in ("tq4", "tq3", "tq2", "k8v4") for head_dim in HEAD_DIMS]
CASES += [(name, 128) for name in ROTATED if name not in ("tq4", "tq3", "tq2", "k8v4")]


def _assert_distortion(original: torch.Tensor, restored: torch.Tensor, predicted: float) -> None:
    """Mean of |x - x_hat|^2 over that of |x|^2, with enough samples to see the tolerance."""
    error, power = ((original - restored) ** 2).sum(-1).flatten(), (original**2).sum(-1).mean()
    relative = error / power / predicted
    standard_error = float(relative.std()) / math.sqrt(len(relative))

    assert SIGMAS * standard_error < DISTORTION, "too few samples to tell"
    assert float(relative.mean()) == pytest.approx(1, abs=DISTORTION)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_gaussian_keys_and_values_distort_as_predicted(
    name: str, head_dim: int, generator: torch.Generator
) -> None:
    """With the centre as shipped.

    The mean of P independent tokens takes 1 / P of the keys' energy with it, and what is left still points
    anywhere with equal probability: (P - 1) / P of the energy is distorted as without a centre.
    """
    spec = preset(name)
    layout = PageLayout(spec=spec, head_dim=head_dim, num_kv_heads=2, page_tokens=PAGE_TOKENS)
    keys, values = _gaussian(layout, generator)
    keys_hat, values_hat = dequantize(quantize(keys, values, layout, search=False), layout)

    centred = (PAGE_TOKENS - 1) / PAGE_TOKENS
    _assert_distortion(keys, keys_hat, centred * norm_corrected_distortion(spec.key, head_dim))
    _assert_distortion(values, values_hat, norm_corrected_distortion(spec.value, head_dim))


@pytest.mark.parametrize("code", ROTATED_CODES)
def test_gaussian_keys_without_a_centre(code: Code, generator: torch.Generator) -> None:
    """And values of the 8-bit code, which no preset has."""
    layout = PageLayout(
        spec=CodecSpec(key=code, value=code), head_dim=64, num_kv_heads=1, page_tokens=PAGE_TOKENS
    )
    keys, values = _gaussian(layout, generator)
    for side, side_hat in zip(
        (keys, values), dequantize(quantize(keys, values, layout, search=False), layout), strict=True
    ):
        _assert_distortion(side, side_hat, norm_corrected_distortion(code, 64))


def test_fp8_distorts_as_e4m3_does(generator: torch.Generator) -> None:
    layout = PageLayout(spec=preset("fp8"), head_dim=112, num_kv_heads=1, page_tokens=PAGE_TOKENS)
    keys, values = _gaussian(layout, generator)
    for side, side_hat in zip(
        (keys, values), dequantize(quantize(keys, values, layout, search=False), layout), strict=True
    ):
        _assert_distortion(side, side_hat, distortion(e4m3_levels(), 1.0))


@pytest.mark.parametrize("code", ROTATED_CODES)
def test_scalar_quantizer_is_the_gaussian_table(code: Code, generator: torch.Generator) -> None:
    """Plain indices and levels of coordinates at unit scale, without norm correction."""
    # so long a vector has the length sqrt(d) up to 0.1 %: normalising changes nothing
    coordinates = torch.randn(4, 500_000, generator=generator)
    indices, _ = nearest_indices(coordinates, code, search=False)
    restored = level_table(code, torch.device("cpu"))[indices] / TARGETS[code]

    relative = (coordinates - restored).flatten() ** 2 / distortion(positive_levels(code), TARGETS[code])
    assert SIGMAS * float(relative.std()) / math.sqrt(len(relative)) < DISTORTION
    assert float(relative.mean()) == pytest.approx(1, abs=DISTORTION)


def test_prediction_tends_to_the_gaussian_table() -> None:
    """At large d the length is certain: 2 - 2 cos becomes 2 - 2 sqrt(1 - D) = D + D^2 / 4 + ..."""
    for code in (Code.LM2, Code.LM3, Code.LM4):
        scalar = distortion(positive_levels(code), TARGETS[code])
        limit = 2 - 2 * math.sqrt(1 - scalar)
        assert norm_corrected_distortion(code, 100_000) == pytest.approx(limit, rel=2e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_hard_inputs_cost_at_most_half_more(kind: str, head_dim: int, generator: torch.Generator) -> None:
    """Keys and values without a centre, with the seed that is shipped, and on average over other seeds.

    A single seed is a single sample for inputs that the rotation takes to few different images, and
    coordinates that are multiples of 2 / sqrt(d) may fall badly between the levels: one of nine seeds had 2.9
    times at d = 64 and 3 bits. That is why the shipped seed is tested by itself.
    """
    vectors = _whole_pages(hard_input(kind, head_dim, generator))
    seeds = [DEFAULT_ROTATION_SEED, *range(8)]
    for code in ROTATED_CODES:
        ratios = []
        for seed in seeds:
            spec = CodecSpec(key=code, value=code, rotation_seed=seed)
            layout = PageLayout(spec=spec, head_dim=head_dim, num_kv_heads=1, page_tokens=16)
            sides = dequantize(quantize(vectors, vectors, layout, search=False), layout)
            assert torch.equal(*sides)
            ratios.append(_relative_error(vectors, sides[0]) / norm_corrected_distortion(code, head_dim))
        assert ratios[0] < HARD_INPUT, code
        assert sum(ratios[1:]) / len(ratios[1:]) < HARD_INPUT, code


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2", "k8v4"])
def test_hard_keys_with_a_centre(name: str, head_dim: int, generator: torch.Generator) -> None:
    """In random order, so that a page mixes channels; relative to the keys themselves."""
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=1, page_tokens=16)
    gaussian = norm_corrected_distortion(layout.spec.key, head_dim)
    for kind in HARD_INPUTS:
        keys = hard_input(kind, head_dim, generator)
        keys = _whole_pages(keys[torch.randperm(len(keys), generator=generator)])
        keys_hat, _ = dequantize(quantize(keys, keys, layout, search=False), layout)
        assert _relative_error(keys, keys_hat) < HARD_INPUT * gaussian, kind


@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2", "k8v4"])
def test_the_centre_removes_an_offset_that_ruins_keys_without_it(
    name: str, generator: torch.Generator
) -> None:
    """Qwen2.5: the constant part of the keys is 50 times what distinguishes them."""
    spec = preset(name)
    noise = torch.randn(64 * PAGE_TOKENS, 2, 128, generator=generator)
    offset = 50 * torch.randn(2, 128, generator=generator)
    errors = {}
    for center in KeyCenter:
        layout = PageLayout(
            spec=dataclasses.replace(spec, key_center=center),
            head_dim=128,
            num_kv_heads=2,
            page_tokens=PAGE_TOKENS,
        )
        keys_hat, _ = dequantize(quantize(noise + offset, noise, layout, search=False), layout)
        errors[center] = float(((keys_hat - noise - offset) ** 2).sum() / (noise**2).sum())
    gaussian = norm_corrected_distortion(spec.key, 128)

    # fp16 rounds an offset of 50 by up to 2^-6, but what it loses stays in z = y - c
    assert errors[KeyCenter.PAGE] == pytest.approx(gaussian * (PAGE_TOKENS - 1) / PAGE_TOKENS, rel=0.02)
    # and without a centre the error is that of a vector 2501 times as strong
    assert errors[KeyCenter.NONE] > 1000 * gaussian


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("code", [Code.LM2, Code.LM3, Code.LM4])
def test_search_takes_off_what_is_promised(code: Code, head_dim: int, generator: torch.Generator) -> None:
    """Against a search in double precision, with exact angles, of the same vectors."""
    vectors = torch.randn(GAUSSIAN_COORDINATES // 4 // head_dim, head_dim, generator=generator)
    indices, scales = nearest_indices(vectors, code)
    assert scales is not None
    restored = level_table(code, torch.device("cpu"))[indices] * scales.float()[:, None]
    plain, best = exact_search(vectors.double(), code)
    found = _relative_error(vectors, restored)

    assert found == pytest.approx(best, rel=SEARCH)
    assert plain == pytest.approx(norm_corrected_distortion(code, head_dim), rel=3 * DISTORTION)
    if head_dim in SEARCH_GAIN[code]:
        assert found / plain == pytest.approx(1 - SEARCH_GAIN[code][head_dim], abs=0.01)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_two_bit_values_lose_a_hundredth_of_what_they_have_in_common(
    head_dim: int, generator: torch.Generator
) -> None:
    """Against 6 % at equal lengths, for 7 % more error; `kernels/README.md` says why."""
    layout = PageLayout(
        spec=CodecSpec(key=Code.LM2, value=Code.LM2),
        head_dim=head_dim,
        num_kv_heads=1,
        page_tokens=PAGE_TOKENS,
    )
    vectors, _ = _gaussian(layout, generator)
    keys, values = dequantize(quantize(vectors, vectors, layout), layout)
    slopes = [float((side * vectors).sum() / vectors.square().sum()) for side in (keys, values)]

    assert slopes == pytest.approx([0.941, 0.988], abs=0.002)
    more = _relative_error(vectors, values) / _relative_error(vectors, keys)
    assert more == pytest.approx(1.07, abs=0.01)


def test_values_that_are_levels_already_are_written_at_equal_length() -> None:
    """Or a page that is loaded and saved again would grow by 5 % each time."""
    indices = torch.arange(64).mul(7).remainder(4)[None]
    levels = level_table(Code.LM2, torch.device("cpu"))[indices]
    found, scales = nearest_indices(3 * levels, Code.LM2, gain=1.05)
    assert torch.equal(found, indices.int())
    assert scales is not None
    assert scales.tolist() == [3.0]


def _gaussian(layout: PageLayout, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = GAUSSIAN_COORDINATES // (layout.head_dim * layout.num_kv_heads)
    shape = (-(-tokens // PAGE_TOKENS) * PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _whole_pages(vectors: torch.Tensor) -> torch.Tensor:
    """As tokens of one head; sizes here are multiples of 16 by construction."""
    assert len(vectors) % 16 == 0
    return vectors[:, None]


def _relative_error(original: torch.Tensor, restored: torch.Tensor) -> float:
    return float(((original - restored) ** 2).sum() / (original**2).sum())
