"""Whole pages made and read on a device that holds neither: tokens go there, or pages do, in one launch."""

import torch

from tq_kernels import PageLayout
from tq_kernels.dequantize import dequantize_pages
from tq_kernels.quantize import quantize_slots


def quantize_on(
    device: torch.device, keys: torch.Tensor, values: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """Pages on the device, packed by Triton's kernels in one launch."""
    dtype = keys.dtype if keys.dtype.itemsize > 1 else torch.bfloat16  # which holds every fp8 exactly
    num_tokens = keys.shape[0]
    pages = torch.empty(num_tokens // layout.page_tokens, layout.page_bytes, dtype=torch.uint8, device=device)
    slots = torch.arange(num_tokens, device=device)
    quantize_slots(keys.to(device, dtype), values.to(device, dtype), slots, pages, layout)
    return pages


def dequantize_on(
    device: torch.device, pages: torch.Tensor, layout: PageLayout, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[tokens, heads, dim]`` on the device, unpacked by Triton's kernels in one launch."""
    shape = (pages.shape[0], layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    order = torch.arange(pages.shape[0], dtype=torch.int32, device=device)
    slots = torch.arange(pages.shape[0] * layout.page_tokens, device=device)
    dequantize_pages(pages.to(device), order, keys, values, slots, layout)
    return keys.flatten(0, 1), values.flatten(0, 1)
