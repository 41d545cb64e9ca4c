"""What a process of vLLM knows of its device and of its hashes. Served: vLLM 0.26 to 0.33."""

import logging
import os

from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

logger = logging.getLogger(__name__)


def platform_name() -> str:
    """The engine's kind of device, with its capability where it has one."""
    capability = current_platform.get_device_capability()
    return f"{current_platform.device_type} {capability.as_version_str() if capability else ''}".strip()


def hash_seed() -> bytes:
    """What the first block's hash is chained to: other algorithms and seeds have another.

    Says so where no other process can have the same, and nothing that is saved will be found by one.
    """
    seeds = [os.environ.get("PYTHONHASHSEED")]
    advice = "with PYTHONHASHSEED set to one number for all replicas"
    if hasattr(kv_cache_utils, "get_none_hash_seed"):  # 0.29 and later have a fixed seed too
        seeds = [kv_cache_utils.DEFAULT_NONE_HASH_SEED, *seeds]
        seed = kv_cache_utils.get_none_hash_seed()
        advice = "with --prefix-caching-hash-algo sha256_cbor"
    else:
        seed = seeds[0]
    if seed is None or seed not in seeds:
        logger.warning(
            "this engine seeds its hashes at random, so no other finds its pages in the store: start it %s",
            advice,
        )
    return bytes(kv_cache_utils.NONE_HASH)
