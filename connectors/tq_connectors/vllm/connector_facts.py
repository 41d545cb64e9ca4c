"""What vLLM's own configuration says of an engine, for a connector. Served: vLLM 0.26 to 0.33."""

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from tq_connectors.vllm.layout_names import layout_of
from tq_connectors.vllm.plan import EngineFacts
from tq_connectors.vllm.process_facts import platform_name
from tq_store.errors import ConfigError


def engine_facts(config: VllmConfig, kv_cache: KVCacheConfig, page_tokens: int) -> EngineFacts:
    """Facts about an engine's cache, of which whole pages are moved.

    Raises:
        ConfigError: It is no cache of keys and values of full attention, or pages are not whole blocks.
    """
    groups = kv_cache.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        raise ConfigError(
            f"TQStoreConnector serves models whose layers all have full attention, and this one has {kinds}: "
            "of others it would read blocks that vLLM has freed; use `TQOffloadingSpec`"
        )
    spec, layers = groups[0].kv_cache_spec, groups[0].layer_names
    dtype = config.cache_config.cache_dtype
    if dtype == "auto":
        dtype = str(config.model_config.dtype).removeprefix("torch.")
    is_plain = dtype in ("bfloat16", "float16")
    if is_plain and page_tokens % spec.block_size:
        raise ConfigError(
            f"page_tokens is {page_tokens}, blocks have {spec.block_size}: pages are whole blocks"
        )
    parallel = config.parallel_config
    return EngineFacts(
        model=config.model_config.model,
        dtype=dtype,
        num_layers=(len(layers),),
        block_tokens=(spec.block_size,),
        blocks_per_chunk=page_tokens // spec.block_size if is_plain else 1,
        block_bytes=spec.page_size_bytes * len(layers),
        tp_size=parallel.tensor_parallel_size,
        world_size=parallel.world_size,
        token_ranks=parallel.prefill_context_parallel_size * parallel.decode_context_parallel_size,
        layout=layout_of(config),
        platform=platform_name(),
        is_replicated=False,
    )


def heads_of_model(config: VllmConfig) -> tuple[int, int]:
    """KV heads of the whole model, and channels of each."""
    model = config.model_config
    return model.get_total_num_kv_heads(), model.get_head_size()


def layers_as_bytes(kv_cache: KVCacheConfig, caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """``[num_blocks, bytes of a block]`` int8 of each layer, in the model's order.

    Raises:
        ConfigError: Blocks are not in one run, or are cut into smaller ones.
    """
    (group,) = kv_cache.kv_cache_groups
    layers = []
    for name in group.layer_names:
        cache = caches[name]
        num_bytes = group.kv_cache_spec.page_size_bytes
        item = cache.element_size()
        is_dense = sorted(cache.stride()[1:])[0] == 1 and cache[0].numel() * item == num_bytes
        if cache.shape[0] != kv_cache.num_blocks or not is_dense:
            raise ConfigError(
                f"the blocks of {name}, {list(cache.shape)}, are not {num_bytes} bytes in one run"
            )
        view = torch.empty(0, dtype=torch.int8, device=cache.device)
        size, stride = (kv_cache.num_blocks, num_bytes), (cache.stride(0) * item, 1)
        layers.append(view.set_(cache.untyped_storage(), cache.storage_offset() * item, size, stride))
    return layers
