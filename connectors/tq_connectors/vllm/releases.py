"""What of ours a release of vLLM is too old for, and the sentence that says so.

A release is known by what it has, as builds from source have versions of all kinds.
"""

from importlib.util import find_spec

from tq_store.errors import ConfigError


def require_pages() -> None:
    """Go on where the cache may hold pages of ours.

    Raises:
        ConfigError: A block's bytes are not the backend's to choose; vLLM before 0.29.
    """
    if find_spec("vllm.v1.kv_cache_layout") is None:
        raise ConfigError("compressed pages in the cache need vLLM 0.29 or later")


def require_offloading() -> None:
    """Go on where vLLM's offloading framework is the one that `TQOffloadingSpec` and `TQStoreTier` know.

    Raises:
        ConfigError: It is another, or there is none; vLLM before 0.30.
    """
    try:
        from vllm.v1.kv_offload.config import OffloadingGroupConfig
    except ImportError:
        fields = {}
    else:
        fields = OffloadingGroupConfig.__dataclass_fields__
    if "group_id" not in fields:
        raise ConfigError(
            "TQOffloadingSpec and TQStoreTier need vLLM 0.30 or later; TQStoreConnector serves this one"
        )
