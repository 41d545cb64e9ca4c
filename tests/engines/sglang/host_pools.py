"""SGLang's own pools, without an engine around them."""

from typing import Any

import engines.sglang.cpu_host_pools  # noqa: F401
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

LAYERS, HEADS, DIM, PAGE_TOKENS, NUM_PAGES = 2, 2, 32, 64, 4


def device_pool(dtype: torch.dtype = torch.float32) -> Any:
    """A pool with something in it."""
    pool = MHATokenToKVPool(
        NUM_PAGES * PAGE_TOKENS,
        PAGE_TOKENS,
        dtype=dtype,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    generator = torch.Generator().manual_seed(1)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        numbers = torch.randn(buffer.shape, generator=generator).to(dtype)
        buffer.copy_(numbers.view(buffer.dtype))  # SGLang keeps fp8 as bytes
    return pool


def host_pool(layout: str, dtype: torch.dtype = torch.float32) -> Any:
    """A host pool with something in it."""
    device, common = device_pool(dtype), {"pin_memory": False, "device": "cpu"}
    if hasattr(device, "_mha_buffer_info"):  # 0.5.23
        info = device._mha_buffer_info()
        layers = {"start_layer": 0, "end_layer": LAYERS}
        common |= {"device_capacity_tokens": NUM_PAGES * PAGE_TOKENS, **layers}
        pool = MHATokenToKVPoolHost(info, 2.0, 0, PAGE_TOKENS, layout, **common)
    else:
        pool = MHATokenToKVPoolHost(device, 2.0, 0, PAGE_TOKENS, layout, **common)
    numbers = torch.randn(pool.kv_buffer.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    pool.kv_buffer.copy_(numbers.view(pool.dtype))
    return pool
