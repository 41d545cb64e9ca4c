"""Nearest levels of the exact Lloyd-Max codebooks, which baselines share."""

from functools import lru_cache

import torch

from tq_kernels import codebook


def nearest_levels(coordinates: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest level of each coordinate, which is taken for N(0, 1); on a boundary the larger one."""
    levels = torch.tensor(_levels(bits)).to(coordinates)
    boundaries = torch.tensor(codebook.midpoints(_levels(bits))).to(coordinates)
    return levels[torch.bucketize(coordinates.abs(), boundaries, right=True)].copysign(coordinates)


@lru_cache(maxsize=8)
def _levels(bits: int) -> tuple[float, ...]:
    return codebook.lloyd_max(bits)
