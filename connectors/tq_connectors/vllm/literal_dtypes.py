"""Names of cache dtypes for vLLM 0.29 to 0.32, which have a `Literal` and a table; 0.33 has a hook."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch


def extend_literal(names: Sequence[str]) -> None:
    """Add names to the dtypes that vLLM's configuration and its selector of backends take.

    Args:
        names: Dtypes of one byte an element. What vLLM knows already stays as it is.

    Raises:
        Exception: vLLM keeps its dtypes elsewhere.
    """
    import vllm.config.cache as cache
    import vllm.utils.torch_utils as torch_utils
    import vllm.v1.attention.selector as selector
    from pydantic.dataclasses import rebuild_dataclass

    known = get_args(cache.CacheDType)
    if set(names) <= set(known):
        return
    extended = Literal[(*known, *(name for name in names if name not in known))]  # type: ignore[valid-type]
    field = cache.CacheConfig.__dataclass_fields__["cache_dtype"]
    cache.CacheDType = selector.CacheDType = extended
    cache.CacheConfig.__annotations__["cache_dtype"] = field.type = extended
    for name in names:
        torch_utils.STR_DTYPE_TO_TORCH_DTYPE.setdefault(name, torch.uint8)
    rebuild_dataclass(cache.CacheConfig, force=True)
