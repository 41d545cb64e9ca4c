"""Names of cache layouts for vLLM 0.26 to 0.28, where a process has one of two; 0.29 resolves one of six."""

import os
from collections.abc import Iterable

import torch
from vllm.config import CacheConfig, VllmConfig

from tq_store.errors import ConfigError

HEAD_MAJOR, TOKEN_MAJOR = "LBHNC", "LBNHC"
_OLD_NAMES = {HEAD_MAJOR: "HND", TOKEN_MAJOR: "NHD"}


def has_six_layouts() -> bool:
    """Whether the engine's configuration says which layout its caches have."""
    return "kv_cache_layout" in CacheConfig.__dataclass_fields__


def required_layout() -> str:
    """Blocks of a layer in one run, one head after the other, as this vLLM calls that."""
    return HEAD_MAJOR if has_six_layouts() else _OLD_NAMES[HEAD_MAJOR]


def layout_of(config: VllmConfig) -> str | None:
    """The layout of the engine's caches: of old releases that which the operator asks for, or else we do.

    There a backend may choose another one, in the workers alone; `check_layout` finds that.
    """
    if has_six_layouts():
        name: str | None = config.cache_config.kv_cache_layout
        return name
    is_token_major = os.environ.get("VLLM_KV_CACHE_LAYOUT") == _OLD_NAMES[TOKEN_MAJOR]
    return TOKEN_MAJOR if is_token_major else HEAD_MAJOR


def check_layout(layout: str | None, caches: Iterable[torch.Tensor]) -> None:
    """Hold caches ``[num_blocks, heads, tokens, channels]`` against the layout that was assumed.

    Raises:
        ConfigError: They have another.
    """
    if has_six_layouts():
        return
    for cache in caches:
        _, num_heads, num_tokens, _ = cache.shape
        is_head_major = cache.stride(1) > cache.stride(2)
        if num_heads > 1 and num_tokens > 1 and is_head_major != (layout == HEAD_MAJOR):
            found = _OLD_NAMES[HEAD_MAJOR if is_head_major else TOKEN_MAJOR]
            raise ConfigError(
                f"this engine's attention backend lays its cache out as {found}: set "
                f"VLLM_KV_CACHE_LAYOUT={found}"
            )
