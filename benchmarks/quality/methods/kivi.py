"""KIVI: keys uniform per channel over groups of tokens, values uniform per token over groups of channels."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides
from benchmarks.quality.methods.uniform import uniform

_VALUE_GROUP = 32


@dataclass(frozen=True, slots=True)
class Kivi:
    """KIVI at some bits. Its window of raw newest tokens is the harness's tail, equal for all methods."""

    name: str
    bits: int
    group_tokens: int = 128

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Codes, and fp16 scale and zero of every group of keys and of values."""
        dim = geometry.head_dim
        token_bytes = 2 * dim * self.bits / 8 + 4 * -(-dim // _VALUE_GROUP)
        groups = -(-num_tokens // self.group_tokens)
        head_bytes = token_bytes * (num_tokens - num_sinks) + 4 * dim * groups
        return (
            geometry.num_layers * geometry.num_kv_heads * head_bytes
            + geometry.raw_bytes_per_token * num_sinks
        )

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """No state."""

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: None, place: Place) -> Sides:
        """See `Method`; a group has statistics of what it holds, less the sinks."""
        groups = list(keys.split(self.group_tokens))
        sinks, groups[0] = groups[0][: place.num_sinks], groups[0][place.num_sinks :]
        read_keys = torch.cat([sinks, *(uniform(group, self.bits, dim=0) for group in groups if len(group))])
        parts = [uniform(part, self.bits, dim=-1) for part in values.split(_VALUE_GROUP, dim=-1)]
        return read_keys, torch.cat(parts, dim=-1)


KIVI4, KIVI2 = Kivi("kivi4", 4), Kivi("kivi2", 2)
FINE = (Kivi("kivi4-g32", 4, 32), Kivi("kivi2-g32", 2, 32))
"""With the groups of 32 tokens of KIVI's own code: better, at another bit a key coordinate."""
