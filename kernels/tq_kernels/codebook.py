"""The codebooks: shipped levels, and the functions that derive and judge them.

Levels are symmetric, so an index is a sign and a magnitude. They are restricted to values that FP8 e4m3 holds
exactly, so that a level is one byte that tensor cores read; Gaussian distortion grows by at most 0.7 %.
A coordinate of standard deviation one is multiplied by the code's target before it is compared with levels.
"""

import itertools
import math
from collections.abc import Callable, Sequence

LEVELS: dict[int, tuple[float, ...]] = {
    2: (12.0, 40.0),
    3: (6.0, 18.0, 32.0, 52.0),
    4: (2.25, 6.5, 11.0, 16.0, 22.0, 28.0, 36.0, 48.0),
}
"""Positive levels by bits, ascending."""

TARGETS: dict[int, float] = {2: 26.4923, 3: 24.0839, 4: 17.4784, 8: 24.5}
"""Standard deviation that rotated coordinates are brought to; 8 is e4m3 itself, where no vector of up to
334 channels can then exceed the largest finite value, 448."""

VALUE_GAINS: dict[int, float] = {2: 1.05}
"""Factor by which writers that search make the scales of values larger than equal lengths would, by bits.

At equal lengths a reconstruction's part along its vector is too short by about half the distortion. That part
all tokens have in common, so attention does not average it out as it does the rest of the error. At 2 bits it
is 6 % and shows in a model's logits; at 3 and 4 bits 1.7 % and 0.5 %, and does not.
"""

GAIN_LIKENESS = 0.96
"""Squared cosine with its levels from which on a value has no gain: it has been quantized before, and must
come out as it went in. Of 2-bit levels and a Gaussian vector it is 0.89."""


def e4m3_levels() -> tuple[float, ...]:
    """All finite e4m3 values that are not negative, ascending: the levels of the 8-bit code."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return tuple(subnormal + normal)


def midpoints(levels: Sequence[float]) -> tuple[float, ...]:
    """Boundaries between neighbouring positive levels; a magnitude on a boundary takes the upper level."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(levels))


def lloyd_max(bits: int) -> tuple[float, ...]:
    """Positive half of the exact Lloyd-Max codebook for N(0, 1).

    Each level is the mean of its cell, each boundary the middle of two levels; iterated to a fixed point.
    TurboQuant (arXiv 2504.19874) section 3.1.
    """
    count = 1 << (bits - 1)
    levels = [2.5 * (i + 0.5) / count for i in range(count)]
    for _ in range(20_000):
        edges = [0.0, *midpoints(levels), math.inf]
        means = [
            (_density(low) - _density(high)) / (_tail(low) - _tail(high))
            for low, high in itertools.pairwise(edges)
        ]
        change = max(abs(a - b) for a, b in zip(means, levels, strict=True))
        levels = means
        if change < 1e-13:
            break
    return tuple(levels)


def distortion(levels: Sequence[float], target: float, head_dim: int | None = None) -> float:
    """Mean squared error of nearest-level quantization of a coordinate of variance one.

    Args:
        levels: Positive levels.
        target: What the coordinate is multiplied by first.
        head_dim: Take the law of a coordinate of a uniform unit vector times sqrt(head_dim), a scaled Beta
            law, in place of its Gaussian limit.
    """
    density = _density if head_dim is None else _sphere_density(head_dim)
    limit = 12.0 if head_dim is None else math.sqrt(head_dim)
    edges = [0.0, *(edge / target for edge in midpoints(levels)), limit]
    total = 0.0
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        if low < limit:
            total += _simpson(
                lambda x, at=level / target: (x - at) ** 2 * density(x),  # type: ignore[misc]
                low,
                min(high, limit),
            )
    return 2 * total


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def _sphere_density(head_dim: int) -> Callable[[float], float]:
    log_norm = math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2) - math.log(math.pi * head_dim) / 2
    power = (head_dim - 3) / 2
    return lambda x: math.exp(log_norm) * max(0.0, 1 - x * x / head_dim) ** power


def _simpson(function: Callable[[float], float], low: float, high: float, steps: int = 400) -> float:
    width = (high - low) / steps
    inner = sum((4 if i % 2 else 2) * function(low + i * width) for i in range(1, steps))
    return (function(low) + inner + function(high)) * width / 3
