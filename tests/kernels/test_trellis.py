"""The search finds the nearest path, and its error at a given rate is what the code promises."""

import heapq
import itertools
import math

import pytest
import torch

from tq_kernels.trellis import LARGEST_LEVEL, NEXT_STATE, NUM_STATES, nearest_levels
from tq_kernels.trellis_tables import FREQUENCIES, RATES, STEPS

FREE_DISTANCE = 10
"""Ungerboeck's eight-state code for amplitudes, in squared levels."""


def is_path(levels: list[int]) -> bool:
    state = 0
    for level in levels:
        if level & 1 != state & 1:
            return False
        state = NEXT_STATE[state][level >> 1 & 1]
    return True


def test_next_states_are_part_of_the_format() -> None:
    assert NEXT_STATE == ((0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4))


def test_paths_that_part_stay_ten_apart() -> None:
    """Shortest way by squared distance from any pair of states back to a common one."""
    shortest = math.inf
    for state in range(NUM_STATES):
        # parallel ways: the same parity, so levels a multiple of 4 apart
        shortest = min(shortest, 16)
        heap = [(4, NEXT_STATE[state][0], NEXT_STATE[state][1])]
        seen = set()
        while heap:
            distance, one, other = heapq.heappop(heap)
            if one == other:
                shortest = min(shortest, distance)
                break
            if (one, other) in seen:
                continue
            seen.add((one, other))
            for p, q in itertools.product((0, 1), repeat=2):
                apart = ((one & 1) + 2 * p - (other & 1) - 2 * q) % 4
                step = min(apart, 4 - apart) ** 2
                heapq.heappush(heap, (distance + step, NEXT_STATE[one][p], NEXT_STATE[other][q]))
    assert shortest == FREE_DISTANCE


def test_search_finds_the_nearest_of_all_paths(generator: torch.Generator) -> None:
    vectors = 2 * torch.randn(40, 5, generator=generator)
    found = nearest_levels(vectors, torch.full((40,), 8.0))

    paths = [path for path in itertools.product(range(-8, 9), repeat=3) if is_path(list(path))]
    for vector, levels in zip(
        vectors[:, :3], nearest_levels(vectors[:, :3], torch.full((40,), 8.0)), strict=True
    ):
        best = min(
            sum((float(x) - level) ** 2 for x, level in zip(vector, path, strict=True)) for path in paths
        )
        assert float(((vector - levels) ** 2).sum()) == pytest.approx(best, rel=1e-5)
    assert all(is_path(levels.tolist()) for levels in found)


@pytest.mark.parametrize("limit", [4.0, 5.0, 64.0, float(LARGEST_LEVEL)])
def test_no_level_exceeds_its_limit(limit: float, generator: torch.Generator) -> None:
    vectors = 300 * torch.randn(64, 32, generator=generator)
    vectors[0] = torch.tensor([1e30, -1e30]).repeat(16)
    levels = nearest_levels(vectors, torch.full((64,), limit))

    assert int(levels.abs().max()) <= limit
    assert all(is_path(row.tolist()) for row in levels)


def test_what_is_a_path_already_stays(generator: torch.Generator) -> None:
    limits = torch.full((16,), 100.0)
    levels = nearest_levels(20 * torch.randn(16, 64, generator=generator), limits)

    assert torch.equal(nearest_levels(levels.float(), limits), levels)


def test_vectors_are_searched_one_by_one_whatever_their_number(generator: torch.Generator) -> None:
    """More coordinates than are searched at once; and none at all."""
    vectors = 3 * torch.randn(5000, 64, generator=generator)
    limits = torch.full((5000,), 12.0)
    levels = nearest_levels(vectors, limits)

    assert torch.equal(levels[4990:], nearest_levels(vectors[4990:], limits[4990:]))
    assert nearest_levels(vectors[:0], limits[:0]).shape == (0, 64)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_rate_has_the_error_that_it_promises(head_dim: int, generator: torch.Generator) -> None:
    """Plain Gaussian coordinates, coded with the table of their rate: within 0.75 dB of Shannon's bound."""
    vectors = torch.randn((1 << 18) // head_dim, head_dim, generator=generator)
    for rate in (1.5, 2.0, 3.0, 4.0, 5.0):
        table = RATES.index(rate)
        limit = 2.0 * (len(FREQUENCIES[table][0]) - 1)
        levels = nearest_levels(vectors / STEPS[table], torch.full((len(vectors),), limit)).long()
        grids = levels & 1
        frequencies = torch.zeros(2, LARGEST_LEVEL)
        for grid in (0, 1):
            half = FREQUENCIES[table][grid]
            frequencies[grid, : len(half)] = torch.tensor(half)
        mirrored = torch.where(levels < 0, -levels, levels)
        cost = 12 - frequencies[grids, (mirrored - grids) >> 1].log2()
        gain = float((vectors * levels).sum() / (levels**2).sum())
        error = float(((vectors - gain * levels) ** 2).mean())

        bits = float(cost.mean())
        assert bits == pytest.approx(rate, abs=0.02)
        assert 10 * math.log10(error * 4**bits) < 0.75
