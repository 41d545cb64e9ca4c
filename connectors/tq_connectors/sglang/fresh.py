"""Attention among the new tokens of sequences without a prefix: FlashAttention 3 where SGLang brings it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

FLASH_VARIABLE = "TQ_CONNECTORS_FLASH_ATTENTION"
"""`off` leaves FlashAttention 3 untried: a build of it without kernels for a head size ends the process."""

FreshAttention = Callable[..., Any]
_HOPPER = (9, 0)
_PROBED_TOKENS = 16


def flash_attention_3(
    num_query_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    environment: Mapping[str, str],
) -> FreshAttention | None:
    """SGLang's FlashAttention 3 for ragged batches, if it serves these heads here; tried once, on zeros."""
    if environment.get(FLASH_VARIABLE) == "off":
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _HOPPER:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func

        query = torch.zeros(_PROBED_TOKENS, num_query_heads, head_dim, dtype=dtype, device=device)
        keys = torch.zeros(_PROBED_TOKENS, num_kv_heads, head_dim, dtype=dtype, device=device)
        starts = torch.tensor([0, _PROBED_TOKENS], dtype=torch.int32, device=device)
        flash_attn_varlen_func(query, keys, keys, starts, starts, _PROBED_TOKENS, _PROBED_TOKENS, causal=True)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a build of another machine or release raises
        logger.warning("tq-store: prefill without FlashAttention 3: %s", error)
        return None
    attention: FreshAttention = flash_attn_varlen_func
    return attention
