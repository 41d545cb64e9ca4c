"""The pool that SGLang builds for a model with plain keys and values. SGLang 0.5.17 to 0.5.23."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.sglang.hooks.hook import Hook


def build_pool(original: Callable[..., Any], configurator: Any, **arguments: Any) -> Any:
    """SGLang's own construction, with our class in the place of its own."""
    if configurator.kv_cache_dtype_str in DTYPES:
        from tq_connectors.sglang.pool import TQTokenToKVPool

        pool_class = partial(TQTokenToKVPool, dtype_name=configurator.kv_cache_dtype_str)
        arguments |= {"mha_pool_class": pool_class, "quant_method": None}
    return original(configurator, **arguments)


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
    kind="around",
    function=build_pool,
    parameters=("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
)
