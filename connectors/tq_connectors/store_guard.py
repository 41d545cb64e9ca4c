"""StoreGuard: an engine's calls to the store, where an outage costs a few waits and not one a request."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tq_store.errors import RpcError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_Answer = TypeVar("_Answer")


class StoreGuard:
    """Makes calls while the store answers; after a failure it makes none for a second, later for up to 30.

    The pause doubles with every failure, but for those of calls that were made before the last one. Of the
    calls that come after one, the first is made, and the others are misses until it has ended. An outage is
    logged once, and so is its end. Safe to use from several threads.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._rests_until = 0.0
        self._failed_at = -math.inf
        self.skipped_calls = 0
        """Calls that were not made because the store was known to fail."""

    @property
    def is_reachable(self) -> bool:
        """Whether the last call that was made got an answer."""
        return self._pause_s == 0

    def attempt(self, call: Callable[[], _Answer]) -> _Answer | None:
        """What the call returns, or None where it fails or is not made."""
        if not self._may_call():
            return None
        began = self._clock()
        try:
            answer = call()
        except RpcError as error:
            self._failed(error, began)
            return None
        except BaseException:
            self._answered()
            raise
        self._answered()
        return answer

    def _may_call(self) -> bool:
        with self._lock:
            if self._pause_s == 0:
                return True
            now = self._clock()
            if now < self._rests_until:
                self.skipped_calls += 1
                return False
            self._rests_until = now + self._pause_s  # the others wait for this one
            return True

    def _answered(self) -> None:
        with self._lock:
            was_reachable, self._pause_s = self._pause_s == 0, 0.0
        if not was_reachable:
            logger.info("the store answers again")

    def _failed(self, error: RpcError, began: float) -> None:
        with self._lock:
            was_reachable = self._pause_s == 0
            if not was_reachable and began < self._failed_at:
                return
            self._failed_at = self._clock()
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            self._rests_until = self._failed_at + self._pause_s
        if was_reachable:
            logger.warning("the store fails, everything is a miss until it works: %s", error)
