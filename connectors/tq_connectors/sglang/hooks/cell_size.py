"""Bytes that a token takes, from which SGLang sizes its pool. SGLang 0.5.17 to 0.5.23."""

from collections.abc import Callable
from typing import Any

from tq_connectors.engine.layouts import DTYPES, layout_for
from tq_connectors.sglang.hooks.hook import Hook
from tq_connectors.sglang.page_rows import token_bytes


def compute_cell_size(original: Callable[..., int], configurator: Any, kvc: Any, num_layers: int) -> int:
    """Bytes a token over all layers of a rank.

    Args:
        original: SGLang's, for the other dtypes.
        configurator: A `DefaultPoolConfigurator`.
        kvc: Its `KVCacheConfigurator`.
        num_layers: Layers of this rank.

    Raises:
        ValueError: The model keeps more than keys and values of full attention.
    """
    if kvc.kv_cache_dtype_str not in DTYPES:
        return original(configurator, kvc, num_layers)
    from sglang.srt.runtime_context import get_parallel

    return bytes_of_token(kvc, num_layers, get_parallel().attn_tp_size)


def bytes_of_token(kvc: Any, num_layers: int, tp_size: int) -> int:
    """Bytes that a token takes over all layers of one of tp_size ranks that divide the KV heads.

    Raises:
        ValueError: The model keeps more than keys and values of full attention.
    """
    _refuse(kvc)
    model = kvc.model_config
    layout = layout_for(
        kvc.kv_cache_dtype_str,
        head_dim=model.head_dim,
        num_kv_heads=model.get_num_kv_heads(tp_size),
        page_tokens=kvc.page_size,
    )
    return token_bytes(layout, num_layers)


def _refuse(kvc: Any) -> None:
    model = kvc.model_config
    kept = None
    if kvc.use_mla_backend:
        kept = "latent vectors (MLA)"
    elif kvc.is_hybrid_swa:
        kept = "a pool of its own for sliding windows (try --disable-hybrid-swa-memory)"
    elif kvc.mambaish_config is not None:
        kept = "states of linear attention"
    elif model.is_encoder_decoder:
        kept = "keys of an encoder"
    elif model.head_dim != model.v_head_dim:
        kept = f"keys of {model.head_dim} channels and values of {model.v_head_dim}"
    if kept:
        raise ValueError(
            f"--kv-cache-dtype {kvc.kv_cache_dtype_str} serves models whose cache is keys and values of full "
            f"attention, of one head size; this one keeps {kept}"
        )


HOOK = Hook(
    target="sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
    kind="around",
    function=compute_cell_size,
    parameters=("self", "kvc", "num_layers"),
)
