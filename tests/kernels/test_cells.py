"""The tables of cells say what squared errors say, and fit into their words."""

import hashlib
import itertools

import pytest
import torch

from tq_kernels import PageLayout, cells, preset
from tq_kernels._cell_words import cell_words
from tq_kernels.codebook import LEVELS, TARGETS, midpoints

from .slot_cases import CPU

BITS = sorted(LEVELS)
WORDS_SHA256 = "c8a9a8981c500be388cd419a5115a9e6dd68fd57ff25278a966129e9dc92af64"
"""Other words make other pages of the same tokens. That is allowed, and must not happen by accident."""


def test_words_are_those_that_all_writers_choose_by() -> None:
    numbers = ",".join(str(word) for bits in BITS for word in cells.words(bits))
    assert hashlib.sha256(numbers.encode()).hexdigest() == WORDS_SHA256


@pytest.mark.parametrize("bits", BITS)
def test_magnitudes_begin_within_half_a_step_of_their_boundaries(bits: int) -> None:
    step = cells.RANGES[bits] / (cells.NUM_STEPS - 1)
    for size, row in zip(cells.SIZES[bits], cells.magnitudes(bits), strict=True):
        assert row[0] == 0
        assert {high - low for low, high in itertools.pairwise(row)} == {0, 1}
        assert row[-1] == len(LEVELS[bits]) - 1
        for rank, edge in enumerate(midpoints(LEVELS[bits]), 1):
            assert abs(step * row.index(rank) - size * edge) <= step / 2


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_exact_numbers_and_reach_beyond_the_largest_level(bits: int) -> None:
    step = cells.RANGES[bits] / (cells.NUM_STEPS - 1)
    assert (8 * step).is_integer()
    assert cells.RANGES[bits] > 1.12 * LEVELS[bits][-1]


@pytest.mark.parametrize("bits", BITS)
def test_a_word_holds_magnitudes_and_differences(bits: int) -> None:
    near, far = cells.differences(bits)
    for step, word in enumerate(cells.words(bits)):
        assert [word >> shift & 7 for shift in (22, 25, 28)] == [row[step] for row in cells.magnitudes(bits)]
        assert 0 <= word < 1 << 31
        assert (near[step] + (far[step] << 11) - word) % (1 << 22) == 0


@pytest.mark.parametrize("bits", BITS)
def test_sums_of_sixteen_words_and_of_the_widest_vector_can_be_told_apart(bits: int) -> None:
    for row in cells.differences(bits):
        assert min(row) * 16 >= -(1 << 10)
        assert max(row) * 16 < 1 << 10
        assert max(map(abs, row)) * 256 < 1 << 15


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_size_of_least_sum_has_nearly_the_least_squared_error(
    bits: int, head_dim: int, generator: torch.Generator
) -> None:
    """In double precision, of all three sizes; what the tables' rounding costs is within 0.3 %."""
    vectors = torch.randn(4096, head_dim, generator=generator, dtype=torch.float64)
    unit = (vectors * (TARGETS[bits] * head_dim**0.5 / vectors.norm(dim=-1, keepdim=True))).abs()
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    errors = torch.stack(
        [
            (unit - size * levels[torch.bucketize(unit, size * torch.tensor(midpoints(LEVELS[bits])))])
            .square()
            .sum(dim=-1)
            for size in cells.SIZES[bits]
        ]
    )
    steps = (unit / cells.RANGES[bits]).clamp_max(1).mul(cells.NUM_STEPS - 1).long()
    sums = torch.tensor(((0,) * cells.NUM_STEPS, *cells.differences(bits)))[:, steps].sum(dim=-1)
    chosen = errors.gather(0, sums.argmin(dim=0)[None]).sum()
    assert chosen <= 1.003 * errors.amin(dim=0).sum()


def test_codes_that_are_not_searched_have_no_words() -> None:
    table = cell_words(PageLayout(spec=preset("k8v4"), head_dim=64, num_kv_heads=1, page_tokens=16), CPU)
    assert table.dtype is torch.int32
    assert table.tolist() == [[0] * cells.NUM_STEPS, list(cells.words(4))]
