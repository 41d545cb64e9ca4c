"""TurboQuant on tensors. Importing the package does not import torch."""

from tq_kernels.layout import PageLayout
from tq_kernels.spec import PRESETS, Code, CodecSpec, KeyCenter, Rotation, preset

__all__ = ["PRESETS", "Code", "CodecSpec", "KeyCenter", "PageLayout", "Rotation", "preset"]
