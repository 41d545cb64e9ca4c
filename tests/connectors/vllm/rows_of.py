"""Rows and memory that tests of vLLM's tiers share."""

from collections.abc import Callable

import torch

from tq_connectors.vllm.plan import EngineFacts
from tq_kernels import PageLayout, preset


def page_layout(num_kv_heads: int = 2, preset_name: str = "tq4") -> PageLayout:
    return PageLayout(spec=preset(preset_name), head_dim=64, num_kv_heads=num_kv_heads, page_tokens=64)


def memory_of(num_bytes: int, fill: int = 0) -> memoryview:
    return memoryview(bytearray([fill]) * num_bytes)


def facts(**changed: object) -> EngineFacts:
    """An engine with two layers of two heads of 64 channels in bf16, and blocks of 16 tokens."""
    plain = {
        "model": "m",
        "dtype": "bfloat16",
        "num_layers": (2,),
        "block_tokens": (16,),
        "blocks_per_chunk": 8,
        "block_bytes": 2 * 16 * 2 * 2 * 64 * 2,
        "tp_size": 1,
        "world_size": 1,
        "token_ranks": 1,
        "layout": "LBHNC",
        "platform": "cpu",
        "is_replicated": False,
    }
    return EngineFacts(**(plain | changed))  # type: ignore[arg-type]


def heads(num_kv_heads: int = 2, head_dim: int = 64) -> Callable[[], tuple[int, int]]:
    return lambda: (num_kv_heads, head_dim)


def random_cache(num_blocks: int, block_bytes: int) -> torch.Tensor:
    """Blocks of bf16 numbers as vLLM hands them over: bytes."""
    numbers = torch.randn(num_blocks, block_bytes // 2, generator=torch.Generator().manual_seed(1))
    return numbers.bfloat16().view(torch.int8)
