"""What vLLM's offloading framework says of an engine, as the facts that `plan` decides from.

Served: the `OffloadingConfig` of vLLM 0.30 to 0.33.
"""

from pathlib import Path

from vllm.v1.kv_offload.config import OffloadingConfig

from tq_connectors.vllm.plan import EngineFacts
from tq_connectors.vllm.process_facts import platform_name
from tq_store.errors import ConfigError
from tq_store.sizing import read_model


def engine_facts(config: OffloadingConfig) -> EngineFacts:
    """Facts about an engine's cache."""
    parallel = config.parallel
    return EngineFacts(
        model=config.model.name,
        dtype=config.model.dtype,
        num_layers=tuple(len(group.layer_names) for group in config.groups),
        block_tokens=tuple(group.tokens_per_block for group in config.groups),
        blocks_per_chunk=config.cache.blocks_per_chunk,
        block_bytes=config.worker_kv_bytes_per_block,
        tp_size=parallel.tp_size,
        world_size=parallel.world_size,
        token_ranks=parallel.pcp_size * parallel.dcp_size,
        layout=config.kv_cache_layout,
        platform=platform_name(),
        is_replicated=config.replicated_layout,
    )


def heads_of_model(config: OffloadingConfig) -> tuple[int, int]:
    """KV heads and channels of each, from the config.json of the model that the engine has loaded.

    Raises:
        ConfigError: It is not on this machine, or says something else.
    """
    folder = Path(config.model.name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(config.model.name, "config.json")
        if not isinstance(file, str):
            raise ConfigError(f"no config.json of {config.model.name} is here: set num_kv_heads and head_dim")
        folder = Path(file)
    model = read_model(folder)
    return model.num_kv_heads, model.head_dim
