"""Derive `tq_kernels.trellis_tables`: how often indices occur on Gaussian vectors, by rate and grid.

For each rate, a quarter of a bit apart, the step is moved until the indices cost that rate in a code with
their own frequencies. The result is part of the format: it is read from the module, never derived again.

``python -m benchmarks.trellis_tables`` prints the module, formatted as `ruff format` wants it.
"""

import math
import textwrap

import torch

from tq_kernels.trellis import LARGEST_LEVEL, nearest_levels

RATES = tuple(quarter / 4 for quarter in range(4, 23))
SLOT_BITS = 12
REACH = 5.5
"""Standard deviations that the levels of a table must cover; a coordinate beyond takes the last level."""
HEAD_DIM, VECTORS, ROUNDS = 128, 8000, 6


_MODULE = '''"""How often trellis indices occur, by rate and grid; part of the format.

Made by ``python -m benchmarks.trellis_tables``.
"""

RATES = {rates}
"""Bits of an index for which each table was made."""

STEPS = {steps}
"""Distance of neighbouring levels, in standard deviations of a coordinate, that gives these rates."""

_TABLES = """
{tables}
"""

FREQUENCIES = tuple(
    tuple(tuple(map(int, half.split())) for half in table.split("|")) for table in _TABLES.split("\\n\\n")
)
"""By table and grid: slots, of 4,096, of index 0, 1, ..., and as many again for each mirror image."""
'''


def derive(rate: float, vectors: torch.Tensor) -> tuple[float, tuple[list[int], list[int]]]:
    """Step in standard deviations, and the frequencies of indices 0, 1, ... on either grid.

    Args:
        rate: Bits of an index.
        vectors: ``[n, d]`` float32 of length sqrt(d).
    """
    step = math.sqrt(2 * math.pi * math.e) / 2 ** (rate + 1)
    halves: tuple[list[int], list[int]] = ([], [])
    for _ in range(ROUNDS):
        largest = min(LARGEST_LEVEL, 2 * math.ceil((REACH / step + 2) / 2))
        levels = nearest_levels(vectors / step, torch.full((len(vectors),), float(largest))).long()
        bits, halves = 0.0, ([], [])
        for grid in (0, 1):
            # grid 0 mirrors index k to -k, grid 1 to -1 - k
            indices = (levels[(levels & 1) == grid].abs() - grid) >> 1
            counts = torch.bincount(indices, minlength=(largest - grid) // 2 + 1).double()
            halves[grid].extend(_frequencies(counts, grid))
            cost = SLOT_BITS - torch.tensor(halves[grid]).double().log2()
            bits += float((counts * cost).sum())
        step *= 2 ** (bits / levels.numel() - rate)
    return step, halves


def _frequencies(counts: torch.Tensor, grid: int) -> list[int]:
    """Slots of an index, as often counted with either sign; each at least 1, together all."""
    slots = 1 << SLOT_BITS
    sides = torch.full_like(counts, 2.0)
    sides[0] += grid - 1  # of grid 0, index 0 is its own mirror
    half = [max(1, round(float(each))) for each in counts / sides * (slots / counts.sum())]
    half[0] += (slots - int((torch.tensor(half) * sides.long()).sum())) // int(sides[0])
    return half


def main() -> None:
    """Print the module."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(VECTORS, HEAD_DIM, generator=generator)
    vectors *= HEAD_DIM**0.5 / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    derived = [derive(rate, vectors) for rate in RATES]
    paragraphs = [
        textwrap.fill(" | ".join(" ".join(map(str, half)) for half in halves), 100) for _, halves in derived
    ]
    print(
        _MODULE.format(
            rates=RATES,
            steps=tuple(round(step, 5) for step, _ in derived),
            tables="\n\n".join(paragraphs),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
