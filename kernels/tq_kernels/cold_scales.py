"""Scales of a section as bytes: how far each lies below the largest, on a logarithmic grid.

The grid is the same for every section, so a scale that was read lies on it and is written again as it was.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from tq_kernels.entropy import FIRST_SCALE_TABLE, symbol_costs

ZERO = 255
"""Code of a scale of zero."""
OCTAVES = (3, 4, 5)
"""Grid points in an octave, as a power of two: a section has 8, 16 or 32."""
REACH_OCTAVES = 100
"""Largest scales lie in 2^-100 to 2^100; less is zero."""

_FINEST = 1 << OCTAVES[-1]


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of sections, keys then values: code c stands for ``2 ** ((top - c) / 2 ** octave)``, 255 for 0.

    Args:
        codes: ``[sections, 2, tokens]`` int64 in [0, 255].
        top: ``[sections, 2]`` int64, grid point of the largest.
        octave: ``[sections, 2]`` int64, a member of `OCTAVES`.
        middle: ``[sections, 2]`` int64, the code from which the written differences count.
        table: ``[sections, 2]`` int64, number of the table for these differences, from 0.
    """

    codes: torch.Tensor
    top: torch.Tensor
    octave: torch.Tensor
    middle: torch.Tensor
    table: torch.Tensor

    def symbols(self) -> torch.Tensor:
        """What is written: differences to the middle, modulo 256, ``[sections, 2, tokens]`` int64."""
        return (self.codes - self.middle[..., None]) & 0xFF

    def bits(self) -> torch.Tensor:
        """What that costs: ``[sections]`` float32."""
        costs = symbol_costs(self.codes.device)[FIRST_SCALE_TABLE + self.table]
        return costs.gather(2, self.symbols()).sum((1, 2))


def quantize_scales(scales: torch.Tensor, *, fine: torch.Tensor) -> Scales:
    """Nearest grid points.

    Args:
        scales: ``[sections, 2, tokens]`` float32, not negative, at most 2^100.
        fine: ``[sections, 2]`` bool, whether 32 points an octave are worth their bits.
    """
    exponents = torch.log2(scales).clamp_min(-REACH_OCTAVES - 1)
    present = exponents >= -REACH_OCTAVES
    largest = torch.where(present, exponents, -REACH_OCTAVES).amax(2)
    spread = largest - torch.where(present, exponents, largest[..., None]).amin(2)
    # a code less than 254, for the rounding of both ends
    octave = torch.where(fine & (spread < 253 / 32), 5, torch.where(spread < 253 / 16, 4, 3))
    points = torch.round(exponents * (1 << octave)[..., None]).long()
    top = torch.round(largest * (1 << octave)).long()
    codes = torch.where(present, top[..., None] - points, ZERO).clamp_max(ZERO)
    middle = codes.median(2).values
    differences = (codes - middle[..., None]) & 0xFF
    table = symbol_costs(scales.device)[FIRST_SCALE_TABLE:, differences].sum(-1).argmin(0)
    return Scales(codes, top, octave, middle, table)


def dequantize_scales(scales: Scales) -> torch.Tensor:
    """The numbers that codes stand for: ``[sections, 2, tokens]`` float32, the same on every machine."""
    points = scales.top[..., None] - scales.codes << (OCTAVES[-1] - scales.octave)[..., None]
    fractions = _fractions(scales.codes.device).take(points & (_FINEST - 1))
    return torch.where(scales.codes == ZERO, 0, torch.ldexp(fractions, points >> OCTAVES[-1]))


def is_top(top: torch.Tensor, octave: torch.Tensor) -> torch.Tensor:
    """Whether a writer could have written these, of any shape: bool."""
    known = (octave >= OCTAVES[0]) & (octave <= OCTAVES[-1])
    return known & (top.abs() <= REACH_OCTAVES << octave.clamp(OCTAVES[0], OCTAVES[-1]))


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _fractions(device: torch.device) -> torch.Tensor:
    """``2 ** (i / 32)`` float32."""
    return torch.tensor([2 ** (i / _FINEST) for i in range(_FINEST)], dtype=torch.float32, device=device)
