"""The scheduler of SGLang rests while pages are loaded."""

import sys
import time
from typing import Any

REST_S = 0.0003
"""What the scheduler rests in a round while a prompt's pages are on their way, if it has other work. It then
waits for the device more often than not."""
IDLE_REST_S = 0.001
"""The same where it has nothing else to do."""
_IDLE_ROUND_S = 0.0007
"""A round that is over sooner has launched nothing."""


class Rests:
    """The rests of one scheduler, which tells by the length of a round whether it has other work."""

    def __init__(self) -> None:
        self._ended_s = 0.0

    def take(self) -> None:
        """Rest a moment."""
        is_idle = time.monotonic() - self._ended_s < _IDLE_ROUND_S
        time.sleep(IDLE_REST_S if is_idle else REST_S)
        self._ended_s = time.monotonic()


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
            storage.rests.take()
