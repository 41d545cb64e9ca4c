"""The TurboQuant presets of vLLM 0.33, emulated from the description of their slots.

Keys: divided by their length, Hadamard without signs, nearest Lloyd-Max level for N(0, 1/d), fp16 length;
the reconstruction is brought back to that length ("_nc"). k8v4's keys are an e4m3 cast. Values: unrotated,
uniform between the smallest and the largest number of the vector, fp16 scale and zero. On dense models stock
vLLM keeps the first and the last two layers in bf16.
"""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Geometry, Place, Sides
from benchmarks.quality.methods.casts import BF16, FP8
from benchmarks.quality.methods.lloyd_max import nearest_levels
from benchmarks.quality.methods.uniform import uniform
from tq_kernels.rotation import hadamard_matrix

_BOUNDARY_LAYERS = 2


@dataclass(frozen=True, slots=True)
class StockVLLM:
    """One preset.

    Args:
        name: What rows call it.
        key_bits: 8 for the cast, or bits of the Lloyd-Max index.
        value_bits: Bits of the uniform index.
        skips_boundary: Whether the first and last two layers stay bf16, as stock vLLM has it.
    """

    name: str
    key_bits: int
    value_bits: int
    skips_boundary: bool = True
    group_tokens: int = 1

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Slots as vLLM lays them out, padded to an even number of bytes; raw layers in bf16."""
        dim = geometry.head_dim
        key_bytes = dim if self.key_bits == 8 else -(-dim * self.key_bits // 8) + 2
        slot_bytes = key_bytes + -(-dim * self.value_bits // 8) + 4
        slot_bytes += slot_bytes % 2
        raw_layers = sum(self._is_raw(layer, geometry.num_layers) for layer in range(geometry.num_layers))
        layer_bytes = slot_bytes * (geometry.num_layers - raw_layers) + 4 * dim * raw_layers
        token_bytes = geometry.num_kv_heads * layer_bytes
        return token_bytes * (num_tokens - num_sinks) + geometry.raw_bytes_per_token * num_sinks

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """No state."""

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: None, place: Place) -> Sides:
        """See `Method`."""
        if self._is_raw(place.layer, place.num_layers):
            return BF16.read(keys, values, None, place)
        if self.key_bits == 8:
            read_keys, _ = FP8.read(keys, values, None, place)
        else:
            read_keys = _rotated_lloyd_max(keys, self.key_bits)
        return read_keys, uniform(values, self.value_bits, dim=-1)

    def _is_raw(self, layer: int, num_layers: int) -> bool:
        return self.skips_boundary and not _BOUNDARY_LAYERS <= layer < num_layers - _BOUNDARY_LAYERS


def _rotated_lloyd_max(keys: torch.Tensor, bits: int) -> torch.Tensor:
    dim = keys.shape[-1]
    rotation = (hadamard_matrix(dim) / dim**0.5).to(keys)
    norm = keys.norm(dim=-1, keepdim=True)
    unit = (keys / norm.clamp_min(1e-30)) @ rotation.T * dim**0.5
    nearest = nearest_levels(unit, bits)
    scale = norm.half().float() / nearest.norm(dim=-1, keepdim=True)
    read: torch.Tensor = (nearest * scale) @ rotation
    return read


_BITS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}
PRESETS = tuple(StockVLLM(f"vllm-{name}", *bits) for name, bits in _BITS.items())
"""As stock vLLM runs them."""
ALL_LAYERS = tuple(StockVLLM(f"vllm-{name}-all", *bits, skips_boundary=False) for name, bits in _BITS.items())
"""The same with no layer left raw, as a page format would have it."""
