"""Who serves a tensor: Triton's compiler on a GPU, its interpreter on a CPU where asked for, else PyTorch."""

import os
from functools import lru_cache

import torch

_HAS_E4M3 = (8, 9)
"""First CUDA capability that converts to and from e4m3."""


def is_interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_kernel(device: torch.device) -> bool:
    """Whether tensors of the device go to the kernel, and not to the reference."""
    return device.type != "cpu" or is_interpreted()


@lru_cache(maxsize=16)
def has_nvidia_assembly(device: torch.device) -> bool:
    """Whether kernels for the device may use NVIDIA's instructions, e4m3 conversions among them."""
    if device.type != "cuda" or torch.version.cuda is None or is_interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= _HAS_E4M3
