"""The scheduler of SGLang rests while pages are loaded."""

import sys
import time
from typing import Any

REST_S = 0.0003
"""What the scheduler rests in each of its rounds while a prompt's pages are on their way. It has nothing else
to do where that prompt is all there is, and waits for the device where there is more."""


def rest_for_loads(_: object, cache: Any) -> None:
    """Rest a moment, while this store loads pages for a prompt that waits.

    A scheduler that looks for them without a pause takes the interpreter from the very threads that load, and
    they then take four times as long.

    Args:
        cache: SGLang's, with HiCache.
    """
    if getattr(cache, "ongoing_prefetch", None):
        storage = getattr(getattr(cache, "cache_controller", None), "storage_backend", None)
        module = sys.modules.get("tq_connectors.sglang.hicache_storage")
        if module is not None and isinstance(storage, module.TQHiCacheStorage):
            time.sleep(REST_S)
