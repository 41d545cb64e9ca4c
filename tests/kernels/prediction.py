"""What theory says a code must measure: relative distortion of uniformly random directions."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from tq_kernels.cells import SIZES
from tq_kernels.codebook import LEVELS, TARGETS, e4m3_levels, midpoints
from tq_kernels.spec import Code


@lru_cache
def norm_corrected_distortion(code: Code, head_dim: int) -> float:
    """E |k - k_hat|^2 / |k|^2 for a direction uniform on the sphere and the norm-corrected scale.

    The reconstruction |k| L / |L| is as long as k, so the distortion is 2 - 2 cos(k, L). With x the rotated
    direction times sqrt(d), q the quantized x, A the mean of x q and B the mean of q^2 over the channels,
    cos = A / sqrt(B). A and B fluctuate from vector to vector; to second order

        E cos = a / sqrt(b) - cov(A, B) / (2 b^(3/2)) + 3 a var(B) / (8 b^(5/2)).

    a and b are means under the Beta law of one coordinate. The coordinates are not quite independent, since
    x^2 has mean exactly one in every vector; so the part of x q and of q^2 that is linear in x^2 does not
    fluctuate, and variances are those that remain after regression on x^2, divided by d. What is left out is
    of order 1 / d^2. Without the fluctuation terms the prediction is up to 2 % off at d = 64.
    """
    x, weight = _sphere_coordinate(head_dim)
    quantized = _round_to_levels(x, code)
    first, second, square = x * quantized, quantized**2, x**2

    def cov(f: np.ndarray, g: np.ndarray) -> float:
        return float(weight @ (f * g) - (weight @ f) * (weight @ g))

    def residual_cov(f: np.ndarray, g: np.ndarray) -> float:
        return (cov(f, g) - cov(f, square) * cov(g, square) / cov(square, square)) / head_dim

    a, b = float(weight @ first), float(weight @ second)
    cos = a / b**0.5 - residual_cov(first, second) / (2 * b**1.5)
    cos += 3 * a * residual_cov(second, second) / (8 * b**2.5)
    return 2 - 2 * cos


def exact_search(vectors: torch.Tensor, code: Code) -> tuple[float, float]:
    """Relative distortion of float64 ``[n, head_dim]`` with nearest levels, and with the best of `SIZES`."""
    levels = torch.tensor(LEVELS[code], dtype=torch.float64)
    unit = vectors * (vectors.shape[-1] ** 0.5 * TARGETS[code] / vectors.norm(dim=-1, keepdim=True))
    errors = []
    for size in (1.0, *SIZES[code]):
        edges = size * torch.tensor(midpoints(LEVELS[code]), dtype=torch.float64)
        chosen = levels[torch.bucketize(unit.abs(), edges, right=True)]
        errors.append(2 - 2 * torch.cosine_similarity(chosen, unit.abs(), dim=-1))
    power = vectors.square().sum(dim=-1)
    shares = power / power.sum()
    return float(errors[0] @ shares), float(torch.stack(errors[1:]).amin(dim=0) @ shares)


def scalar_slope(levels: Sequence[float], head_dim: int) -> float:
    """E x q(x) for a coordinate x of mean square one: what quantizing without correction leaves of a product.

    It is 1 - D where every level is the mean of its cell, as with Lloyd-Max levels under their own law.
    """
    x, weight = _sphere_coordinate(head_dim)
    return float(weight @ (x * _nearest(x, np.array(levels))))


def positive_levels(code: Code) -> tuple[float, ...]:
    """Positive levels of any rotated code, zero included where the code has it."""
    return e4m3_levels() if code is Code.E4M3_SCALED else LEVELS[code]


def _sphere_coordinate(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of a fine grid over sqrt(d) u_1 >= 0, u uniform on the sphere, and their probabilities."""
    limit = min(head_dim**0.5, 10.0)
    steps = 100_000
    x = (np.arange(steps) + 0.5) * (limit / steps)
    weight = (1 - x * x / head_dim) ** ((head_dim - 3) / 2)
    return x, weight / weight.sum()


def _round_to_levels(x: np.ndarray, code: Code) -> np.ndarray:
    return _nearest(x, np.array(positive_levels(code)) / TARGETS[code])


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
