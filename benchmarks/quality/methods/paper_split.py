"""The fractional rates of the TurboQuant paper: channels split into outliers and the rest, one code for each.

A quarter of the channels, those with the most energy, gets a bit more. Each part is rotated by a random
orthogonal matrix of its own, normalised, and written as the nearest Lloyd-Max level; its length is kept in 16
bits, without norm correction, as in the paper's algorithm 1. The paper's "2.5 bits" are 2.25 and two lengths.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides
from benchmarks.quality.methods.lloyd_max import nearest_levels


@dataclass(frozen=True, slots=True)
class PaperSplit:
    """The split between `bits` and one bit more."""

    name: str
    bits: int
    group_tokens: int = 1

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Codes and two lengths a vector; which channels, a bit each in all of a sequence, is left out."""
        dim = geometry.head_dim
        vector_bytes = (dim * self.bits + dim // 4) / 8 + 4
        token_bytes = 2 * geometry.num_layers * geometry.num_kv_heads * vector_bytes
        return token_bytes * (num_tokens - num_sinks) + geometry.raw_bytes_per_token * num_sinks

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Sides:
        """Order of the channels by energy, the largest first, per head: ``[num_kv_heads, head_dim]`` each."""
        orders = [side.square().mean(0).argsort(-1, descending=True) for side in (keys, values)]
        return orders[0], orders[1]

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: Sides, place: Place) -> Sides:
        """See `Method`."""
        key_order, value_order = state
        return self._read_side(keys, key_order), self._read_side(values, value_order)

    def _read_side(self, vectors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        order = order.expand_as(vectors)
        ordered, split = vectors.gather(-1, order), vectors.shape[-1] // 4
        parts = [
            _lloyd_max(ordered[..., :split], self.bits + 1),
            _lloyd_max(ordered[..., split:], self.bits),
        ]
        return torch.empty_like(vectors).scatter_(-1, order, torch.cat(parts, dim=-1))


def _lloyd_max(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    dim = vectors.shape[-1]
    rotation = _random_rotation(dim).to(vectors)
    norm = vectors.norm(dim=-1, keepdim=True)
    unit = (vectors / norm.clamp_min(1e-30)) @ rotation.T * dim**0.5
    read: torch.Tensor = nearest_levels(unit, bits) @ rotation * (norm.half().float() / dim**0.5)
    return read


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def _random_rotation(dim: int) -> torch.Tensor:
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    rotation: torch.Tensor = torch.linalg.qr(gaussian).Q.float()
    return rotation


SPLITS = (PaperSplit("paper-3.5", 3), PaperSplit("paper-2.5", 2))
