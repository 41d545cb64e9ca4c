"""Min/max uniform quantization with fp16 scale and zero, as several baselines use it."""

import torch


def uniform(groups: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Reconstruction of float32 `groups` from `bits`-bit indices, one fp16 scale and zero along `dim`."""
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    top = (1 << bits) - 1
    scale = ((high - low) / top).half().float()
    zero = low.half().float()
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((groups - zero) / safe).round().clamp(0, top) * scale + zero
