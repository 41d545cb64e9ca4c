"""The step at which the indices of a section fill its bytes, found for many sections at once."""

import itertools
from dataclasses import dataclass, fields

import torch

from tq_kernels.cold_scales import Scales, quantize_scales
from tq_kernels.entropy import FIRST_SCALE_TABLE, symbol_costs
from tq_kernels.trellis import nearest_levels
from tq_kernels.trellis_tables import FREQUENCIES, RATES, STEPS

_FINE_SCALES_FROM = 3.75
"""Bits of an index from which the error of a coarse scale would show."""
_SCALE_BITS = 4
"""About what a scale costs, to begin with."""
_TURNS = 3
_SPARE_BITS = 0.002
"""Bits of an index that may be left over."""
_LOWEST_RATE = -8.0
"""Stands for a step so large that every level is 0, which costs a third of a bit."""


@dataclass(frozen=True, slots=True)
class CodedSections:
    """Sections as integers, keys then values: what remains is to pack them.

    Args:
        levels: ``[sections, 2, tokens, head_dim]`` int8, every vector a path.
        tables: ``[sections, 2]`` int64, number of the table of indices.
        scales: Their scales.
        bits: ``[sections]`` float32, what all of it costs.
    """

    levels: torch.Tensor
    tables: torch.Tensor
    scales: Scales
    bits: torch.Tensor

    def replace(self, rows: torch.Tensor, other: "CodedSections") -> None:
        """Overwrite sections `rows`, by number, with those of another."""
        for mine, theirs in zip(_tensors(self), _tensors(other), strict=True):
            mine[rows] = theirs

    def rows(self, rows: torch.Tensor) -> "CodedSections":
        """Some of the sections, by number."""
        levels, tables, *scales, bits = (each[rows] for each in _tensors(self))
        return CodedSections(levels, tables, Scales(*scales), bits)


def _tensors(sections: CodedSections) -> list[torch.Tensor]:
    scales = [getattr(sections.scales, each.name) for each in fields(Scales)]
    return [sections.levels, sections.tables, *scales, sections.bits]


def fill(vectors: torch.Tensor, budget_bits: torch.Tensor, *, key_extra_bits: float) -> CodedSections:
    """Code sections within their budgets, at the finest step that a short search finds.

    Args:
        vectors: ``[sections, 2, tokens, head_dim]`` float32, finite, rotated and centred: keys, then values.
        budget_bits: ``[sections]`` float32, half a bit an index or more.
        key_extra_bits: How many bits an index of a key is to have more than one of a value.
    """
    num_indices = vectors.shape[1:].numel()
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    units = vectors * (vectors.shape[-1] ** 0.5 / norms.clamp_min(1e-30))[..., None]
    offsets = torch.tensor([key_extra_bits / 2, -key_extra_bits / 2], device=vectors.device)
    rates = (budget_bits - _SCALE_BITS * vectors.shape[1:3].numel()) / num_indices
    best = _code(units, norms, rates[:, None] + offsets)
    latest_bits = best.bits.clone()
    for turn in itertools.count():
        spare, fits = budget_bits - latest_bits, best.bits <= budget_bits
        # beyond the first turns, only sections go on for which nothing fitted
        unfinished = (spare < 0) | (spare > _SPARE_BITS * num_indices) if turn < _TURNS else ~fits
        rows = torch.nonzero(unfinished)[:, 0]
        if not len(rows):
            return best
        # a bit of rate is a bit of every index
        rates[rows] += spare[rows] / num_indices - _SPARE_BITS / 2 * 2 ** max(0, turn - _TURNS)
        tried = _code(units[rows], norms[rows], rates[rows, None] + offsets)
        latest_bits[rows] = tried.bits
        better = (tried.bits <= budget_bits[rows]) & (~fits[rows] | (tried.bits > best.bits[rows]))
        best.replace(rows[better], tried.rows(torch.nonzero(better)[:, 0]))
    raise AssertionError("at a low enough rate all levels are 0, and every budget is kept")


def _code(units: torch.Tensor, norms: torch.Tensor, rates: torch.Tensor) -> CodedSections:
    steps, tables = _steps(rates)
    limits = _largest_levels(units.device)[tables]
    num_tokens = units.shape[2]
    levels = nearest_levels(
        (units / steps[..., None, None]).flatten(0, 2),
        limits[..., None].expand(-1, -1, num_tokens).flatten(),
    ).view(units.shape)
    tables, index_bits = _cheapest_tables(levels, tables)
    lengths = torch.linalg.vector_norm(levels.float(), dim=-1)
    scales = torch.where(lengths > 0, norms / lengths.clamp_min(1), 0)
    coded_scales = quantize_scales(scales, fine=rates >= _FINE_SCALES_FROM)
    return CodedSections(levels, tables, coded_scales, index_bits + coded_scales.bits())


def _steps(rates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps in standard deviations, and the tables made for them, for rates ``[...]``."""
    rates = rates.clamp(_LOWEST_RATE, RATES[-1])
    known = torch.tensor(STEPS, device=rates.device).log2()
    position = (rates - RATES[0]) / (RATES[1] - RATES[0])
    low = position.floor().clamp(0, len(RATES) - 2).long()
    steps = torch.exp2(known[low] + (position - low) * (known[low + 1] - known[low]))
    return steps, position.round().clamp(0, len(RATES) - 1).long()


def _largest_levels(device: torch.device) -> torch.Tensor:
    """Size of the largest level of every table: ``[tables]`` float32."""
    return torch.tensor([2.0 * (len(pair[0]) - 1) for pair in FREQUENCIES], device=device)


def _cheapest_tables(levels: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The given table or a neighbour, whichever is cheapest, by section and side; and bits by section."""
    counts = torch.zeros(*tables.shape, 256, device=levels.device)
    flat = (levels.long() & 0xFF).flatten(2)
    counts.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.float32))
    costs = symbol_costs(levels.device)[:FIRST_SCALE_TABLE].view(-1, 2, 256)
    # level byte 2 k + g to index byte k on grid g
    byte = torch.arange(256, device=levels.device)
    index = ((byte ^ 128) - 128 >> 1) & 0xFF
    by_level = costs[:, byte & 1, index]
    candidates = torch.stack([(tables + shift).clamp(0, len(FREQUENCIES) - 1) for shift in (-1, 0, 1)])
    used = counts > 0
    bits = torch.where(used, counts * by_level[candidates], 0).sum(-1)
    cheapest = bits.argmin(0)
    chosen = candidates.gather(0, cheapest[None])[0]
    return chosen, bits.gather(0, cheapest[None])[0].sum(1)
