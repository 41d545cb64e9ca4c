"""Sharing Python's interpreter with a scheduler that does not rest by itself."""

import sys
import time
from typing import Any

SWITCH_INTERVAL_S = 0.0002
"""A thread of ours that gave up the interpreter's lock, to copy or to wait for the store, has it back after a
switch interval: by default 5 ms, in which 20 pages could be loaded. Our threads hold it for less than this at
a time, and only while pages move, so the scheduler loses little."""


def share_interpreter() -> None:
    """Lower this process's switch interval to ours, where it is longer."""
    if sys.getswitchinterval() > SWITCH_INTERVAL_S:
        sys.setswitchinterval(SWITCH_INTERVAL_S)


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
        from tq_connectors.sglang.hicache_storage import TQHiCacheStorage

        storage = getattr(getattr(cache, "cache_controller", None), "storage_backend", None)
        if isinstance(storage, TQHiCacheStorage):
            time.sleep(REST_S)
