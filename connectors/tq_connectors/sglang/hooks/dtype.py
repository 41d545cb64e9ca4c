"""The dtype of a compressed cache's elements is a byte. SGLang 0.5.17 to 0.5.23."""

from collections.abc import Callable
from typing import Any

import torch

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.sglang.hooks.hook import Hook


def configure_dtype(original: Callable[..., Any], **arguments: Any) -> tuple[str | None, torch.dtype]:
    """The name and the element type of the pool of a model runner."""
    name = arguments["server_args_kv_cache_dtype"]
    if name in DTYPES:
        return name, torch.uint8
    answer: tuple[str | None, torch.dtype] = original(**arguments)
    return answer


HOOK = Hook(
    target="sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype",
    kind="around",
    function=configure_dtype,
    parameters=("server_args_kv_cache_dtype",),
)
