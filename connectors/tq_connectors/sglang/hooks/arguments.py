"""Arguments that a compressed cache implies, and those that it cannot serve."""

import os
from typing import Any

from tq_connectors.engine.layouts import DTYPES, PAGE_TOKENS

BACKEND = "turboquant"
"""Name of the attention backend."""

_REFUSED = {
    "speculative_algorithm": "speculative decoding is not served",
    "enable_deterministic_inference": "its attention is not batch-invariant",
    "enable_two_batch_overlap": "one batch at a time is served",
    "enable_pdmux": "one batch at a time is served",
    "enable_unified_memory": "it keeps a pool of its own",
    "enable_page_major_kv_layout": "it keeps a pool of its own",
    "enable_kv_cache_sharding": "a page lies on one rank",
    "enable_hisparse": "it keeps a pool of its own",
    "prefill_only_disable_kv_cache": "there would be no cache",
    "enable_prefill_cp": "a sequence lies on one rank",
}
"""Arguments that must not be set, and why."""
_GLUE_GRAPH = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"
_ALONE = ("dcp_size", "attn_cp_size")
"""Arguments that must be 1, as a sequence lies on one rank."""


def complete_arguments(arguments: Any) -> None:
    """Choose the page size, the attention backend and eager prefill for a compressed cache.

    Args:
        arguments: SGLang's `ServerArgs` before it resolves anything; others than ours are left alone.

    Raises:
        ValueError: Something was asked for that a compressed cache does not serve.
    """
    if arguments.kv_cache_dtype not in DTYPES:
        if BACKEND in _backends(arguments).values():
            raise ValueError(
                f"the attention backend {BACKEND} serves the KV cache dtypes {', '.join(DTYPES)}, "
                f"not {arguments.kv_cache_dtype}"
            )
        return
    _refuse(arguments)
    if os.environ.get(_GLUE_GRAPH, "").lower() in ("1", "true", "yes", "on"):
        name = f"--kv-cache-dtype {arguments.kv_cache_dtype}"
        raise ValueError(f"{name} prepares steps outside of graphs: unset {_GLUE_GRAPH}")
    if arguments.page_size is None:
        arguments.page_size = PAGE_TOKENS[0]
    arguments.attention_backend = BACKEND
    arguments.disable_prefill_cuda_graph = True


def _refuse(arguments: Any) -> None:
    name = f"--kv-cache-dtype {arguments.kv_cache_dtype}"
    if arguments.page_size is not None and arguments.page_size not in PAGE_TOKENS:
        raise ValueError(
            f"{name} packs values along the tokens of a page, so that --page-size must be "
            f"{' or '.join(map(str, PAGE_TOKENS))}, not {arguments.page_size}"
        )
    for argument, backend in _backends(arguments).items():
        if backend not in (None, BACKEND):
            raise ValueError(
                f"{name} is read by the attention backend {BACKEND} alone, in prefill and in decode: "
                f"leave {argument}={backend} out"
            )
    for argument, reason in _REFUSED.items():
        if getattr(arguments, argument, None):
            raise ValueError(f"{name} cannot be combined with {argument}: {reason}")
    for argument in _ALONE:
        if getattr(arguments, argument, 1) not in (None, 1):
            raise ValueError(f"{name} needs {argument} to be 1: a sequence lies on one rank")


def _backends(arguments: Any) -> dict[str, str | None]:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {name: getattr(arguments, name) for name in names}
