"""`--kv-cache-dtype tq4` and its like: the names that vLLM accepts beside its own."""

import torch

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.vllm.releases import require_pages


def register_dtypes() -> None:
    """Make vLLM know the names of `DTYPES`, as bytes whose meaning is the attention backend's.

    vLLM 0.33 and later have a hook for that; `literal_dtypes` serves 0.29 to 0.32.

    Raises:
        ConfigError: This release is too old for what the dtypes stand for.
        Exception: Whatever a release of vLLM without either place raises.
    """
    require_pages()
    from vllm.config import cache

    if not hasattr(cache, "register_kv_cache_dtype"):
        from tq_connectors.vllm.literal_dtypes import extend_literal

        extend_literal(DTYPES)
        return
    for name in DTYPES:
        if cache.get_kv_cache_dtype_handler(name) is None:
            cache.register_kv_cache_dtype(name)(_handler(name))


def _handler(dtype_name: str) -> type:
    """A class that answers what vLLM asks about a dtype."""
    from vllm.v1.kv_cache_interface import KVQuantMode

    class PageBytes:
        """Pages of bytes that only their backend understands."""

        name = dtype_name

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    return PageBytes
