"""Shipped levels are e4m3 numbers, cost what the design says, and are none of the wrong tables around."""

import itertools
import math

import pytest
import torch

from tq_kernels.codebook import LEVELS, TARGETS, distortion, e4m3_levels, lloyd_max, midpoints

BITS = [2, 3, 4]
SHIPPED = {2: 0.117482, 3: 0.034589, 4: 0.009567}
EXACT = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644}
EXACT_BETA_128 = {1: 0.360889, 2: 0.116000, 3: 0.033966, 4: 0.009315}
EXACT_LEVELS = {
    1: (0.797885,),
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}


def _gaussian_levels(bits: int) -> list[float]:
    return [level / TARGETS[bits] for level in LEVELS[bits]]


@pytest.mark.parametrize("bits", BITS)
def test_every_level_survives_a_cast_to_e4m3(bits: int) -> None:
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)

    assert torch.equal(levels.to(torch.float8_e4m3fn).double(), levels)
    assert len(levels) == 1 << (bits - 1)
    assert (levels.diff() > 0).all()
    assert levels[0] > 0


def test_e4m3_levels_are_what_torch_decodes() -> None:
    decoded = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()

    assert list(e4m3_levels()) == decoded


@pytest.mark.parametrize("bits", BITS)
def test_shipped_distortion_is_the_design_table(bits: int) -> None:
    shipped, exact = distortion(LEVELS[bits], TARGETS[bits]), distortion(lloyd_max(bits), 1.0)

    assert shipped == pytest.approx(SHIPPED[bits], abs=1e-6)
    assert 0 <= shipped / exact - 1 <= 0.0071


@pytest.mark.parametrize("bits", BITS)
def test_the_target_is_the_best_for_its_levels(bits: int) -> None:
    best = distortion(LEVELS[bits], TARGETS[bits])

    assert distortion(LEVELS[bits], TARGETS[bits] * 1.003) > best
    assert distortion(LEVELS[bits], TARGETS[bits] / 1.003) > best


@pytest.mark.parametrize("bits", EXACT)
def test_exact_lloyd_max_matches_the_literature(bits: int) -> None:
    levels = lloyd_max(bits)

    assert distortion(levels, 1.0) == pytest.approx(EXACT[bits], abs=1e-6)
    assert levels == pytest.approx(EXACT_LEVELS.get(bits, levels), abs=1e-5)


@pytest.mark.parametrize("bits", EXACT_BETA_128)
def test_distortion_under_the_beta_law(bits: int) -> None:
    # the table has codebooks made for the Beta law; the Gaussian one costs at most 0.43 % more
    measured = distortion(lloyd_max(bits), 1.0, head_dim=128)

    assert EXACT_BETA_128[bits] <= measured <= EXACT_BETA_128[bits] * 1.0043


def test_sixteen_levels_end_at_2_73_sigma() -> None:
    """The table of quantile-bin means, which shipped elsewhere, ends at 1.97 sigma: 2.1 times the error."""
    quantiles = [_inverse_normal(0.5 + i / 16) for i in range(8)] + [math.inf]
    wrong = [16 * (_density(low) - _density(high)) for low, high in itertools.pairwise(quantiles)]

    assert wrong[-1] == pytest.approx(1.97, abs=0.01)
    assert distortion(wrong, 1.0) > 2 * EXACT[4]
    assert lloyd_max(4)[-1] == pytest.approx(2.7326, abs=1e-4)
    assert _gaussian_levels(4)[-1] == pytest.approx(2.7326, abs=0.02)


@pytest.mark.parametrize("bits", BITS)
def test_levels_scaled_by_root_two_would_be_seen(bits: int) -> None:
    """Centroids scaled by 1 / sqrt(2 d) in place of 1 / sqrt(d), a bug of a public port."""
    assert distortion(LEVELS[bits], TARGETS[bits] * math.sqrt(2)) > 1.3 * SHIPPED[bits]


@pytest.mark.parametrize("bits", BITS)
def test_boundaries_lie_halfway(bits: int) -> None:
    for low, edge, high in zip(LEVELS[bits], midpoints(LEVELS[bits]), LEVELS[bits][1:], strict=False):
        assert edge - low == high - edge
    assert len(midpoints(LEVELS[bits])) == len(LEVELS[bits]) - 1


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _inverse_normal(probability: float) -> float:
    return math.sqrt(2) * torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)).item()
