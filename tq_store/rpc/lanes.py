"""A get over several connections: runs of its keys, each fetched whole by a thread, given out in order.

A call that is under way is always read to its end, whichever block the reader wants next. So the server never
holds blocks of one call for a reader who waits for those of another.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

from tq_store.keys import BlockKey

_RUN_BYTES = 8 << 20
_MOST_RUN_BLOCKS = 64
_RUNS_PER_CONNECTION = 2
"""One is read while the server looks for the other."""


class Stop:
    """Ends the calls of a reader who has left, from another thread than theirs."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._cancels: list[Callable[[], object]] = []

    @contextmanager
    def ends(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Have a call ended by `set`, from now on until it is over."""
        with self._lock:
            self._cancels.append(cancel)
        if self.is_set:
            cancel()
        try:
            yield
        finally:
            with self._lock:
                self._cancels.remove(cancel)

    def set(self) -> None:
        """End all calls, and those that are still to come."""
        with self._lock:
            self.is_set = True
            cancels = [*self._cancels]
        for cancel in cancels:
            cancel()


def fetch_in_order(
    fetch: Callable[[Sequence[BlockKey], Stop], list[bytes | None]],
    keys: Sequence[BlockKey],
    *,
    num_connections: int,
) -> Iterator[bytes | None]:
    """Yield one answer per key. Of each connection two runs of about 8 MiB are held at most, or two blocks.

    Args:
        fetch: Makes one call, and returns one answer per key; run in threads.
        keys: At least one.
        num_connections: Over which calls take turns.

    Raises:
        RpcError: What `fetch` raised, when it is the turn of that run.
    """
    stop, start, run_blocks, largest_bytes = Stop(), 0, 1, 1
    waiting: deque[Future[list[bytes | None]]] = deque()
    num_calls = _RUNS_PER_CONNECTION * num_connections
    with ThreadPoolExecutor(num_calls, thread_name_prefix="tq-store-get") as threads:
        try:
            while waiting or start < len(keys):
                while start < len(keys) and len(waiting) < num_calls:
                    run = keys[start : start + run_blocks]
                    waiting.append(threads.submit(copy_context().run, fetch, run, stop))
                    start += len(run)
                blocks = waiting.popleft().result()
                largest_bytes = max(largest_bytes, *(len(block or b"") for block in blocks))
                run_blocks = max(1, min(2 * run_blocks, _MOST_RUN_BLOCKS, _RUN_BYTES // largest_bytes))
                yield from blocks
        finally:
            for future in waiting:
                future.cancel()
            stop.set()
