"""Caches that only cast: nothing done, bf16, and fp8 as engines have it."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides


@dataclass(frozen=True, slots=True)
class Cast:
    """Every number cast to a dtype and back, saturating, without a scale."""

    name: str
    dtype: torch.dtype
    group_tokens: int = 1

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """See `Method`."""
        cast_bytes = geometry.raw_bytes_per_token * self.dtype.itemsize / 2
        return cast_bytes * (num_tokens - num_sinks) + geometry.raw_bytes_per_token * num_sinks

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """No state."""

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: None, place: Place) -> Sides:
        """See `Method`."""
        largest = torch.finfo(self.dtype).max
        cast_keys, cast_values = (
            side.clamp(-largest, largest).to(self.dtype).float() for side in (keys, values)
        )
        return cast_keys, cast_values


NOTHING = Cast("none", torch.float32)
"""What is left when nothing is done: the noise floor of the harness."""
BF16 = Cast("bf16", torch.bfloat16)
FP8 = Cast("fp8", torch.float8_e4m3fn)
