"""What vLLM's offloading framework says of an engine, as the facts that `plan` decides from.

Served: the `OffloadingConfig` of vLLM 0.32 and 0.33.
"""

import logging
import os
from pathlib import Path

from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.config import OffloadingConfig

from tq_connectors.vllm.plan import EngineFacts
from tq_store.errors import ConfigError
from tq_store.sizing import read_model

logger = logging.getLogger(__name__)


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


def platform_name() -> str:
    """The engine's kind of device, with its capability where it has one."""
    capability = current_platform.get_device_capability()
    return f"{current_platform.device_type} {capability.as_version_str() if capability else ''}".strip()


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


def hash_seed() -> bytes:
    """What the first block's hash is chained to: other algorithms and seeds have another.

    Says so where no other process can have the same, and nothing that is saved will be found by one.
    """
    seed = kv_cache_utils.get_none_hash_seed()
    if seed not in (kv_cache_utils.DEFAULT_NONE_HASH_SEED, os.environ.get("PYTHONHASHSEED")):
        logger.warning(
            "this engine seeds its hashes at random, so no other finds its pages in the store: start it with "
            "--prefix-caching-hash-algo sha256_cbor"
        )
    return bytes(kv_cache_utils.NONE_HASH)
