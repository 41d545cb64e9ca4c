"""Scores of the same samples under two settings: how often one is better, and whether that is chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What separates two lists of scores.

    Args:
        better: Samples with a higher score than the baseline's.
        worse: Samples with a lower one.
        sign_test_p: Two-sided chance of so uneven a division, if better and worse were equally likely.
        difference: Mean score less the baseline's.
        interval: Its 95 % interval, by the spread of the differences.
    """

    better: int
    worse: int
    sign_test_p: float
    difference: float
    interval: tuple[float, float]


def compared(scores: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Compare sample by sample.

    Raises:
        ValueError: The lists are empty, or of different lengths.
    """
    differences = [score - base for score, base in zip(scores, baseline, strict=True)]
    if not differences:
        raise ValueError("there are no samples to compare")
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / max(1, len(differences) - 1)
    half = 1.96 * math.sqrt(variance / len(differences))
    return Comparison(
        better=better,
        worse=worse,
        sign_test_p=sign_test_p(better, worse),
        difference=mean,
        interval=(mean - half, mean + half),
    )


def sign_test_p(better: int, worse: int) -> float:
    """The exact two-sided binomial test; 1.0 where nothing differs."""
    number, fewer = better + worse, min(better, worse)
    tail: float = sum(math.comb(number, count) for count in range(fewer + 1)) / 2**number
    return min(1.0, 2 * tail)
