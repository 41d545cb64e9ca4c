"""Fetches: pages on their way to requests that wait, in bounded host memory."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tq_connectors.sglang.page_store import PageStore

logger = logging.getLogger(__name__)

_MISS_LASTS_S = 1.0
"""How long the store is not asked again about a request for which it had nothing."""
_REST_S = 1.0
"""How long the store is asked about no request once pages were late, as all requests wait for those."""
_SURE = 0.8
"""Of the pages that would come in time at the pace of late, the part that is promised."""


class _Fetch:
    """Pages of one request: their memory once it runs, how many are here, and since when."""

    def __init__(self, hashes: Sequence[str]) -> None:
        self.hashes = list(hashes)
        self.counted_pages = len(hashes)
        self.memory: torch.Tensor | None = None
        self.begun_s = self.promised_s = self.arrived_s = time.monotonic()
        self.num_here = 0
        self.is_running = False
        self.is_over = False
        self.is_dropped = False

    def pages_per_s(self, until_s: float) -> float:
        """At which pace pages have come."""
        return self.num_here / max(until_s - self.begun_s, 1e-6)


class Fetches:
    """Pages that are fetched when a request is looked up, so that they are here when it is scheduled.

    A page is only promised when there is memory for it, and when it is here or is to be expected in time, by
    the pace at which pages came of late: of a long prefix that is its head, and more with every lookup of a
    request that has to wait for its turn. Older requests that have not taken theirs give their memory up for
    newer ones, but for those whose pages are arriving: a fetch keeps its memory until it has stopped.

    Args:
        store: Where pages are.
        page_bytes: Bytes of a page in the store.
        num_layers: Layers of a page, which are kept apart, so that a device reads each in one piece.
        budget_bytes: Most bytes of all pages on their way or waiting.
        wait_s: How long after its last lookup a request waits for its pages.
        num_threads: Fetches at once.
        pinned: Whether a device reads the memory.
    """

    def __init__(
        self,
        store: PageStore,
        *,
        page_bytes: int,
        num_layers: int,
        budget_bytes: int,
        wait_s: float,
        num_threads: int,
        pinned: bool,
    ) -> None:
        self._store = store
        self._wait_s = wait_s
        self._num_layers, self._layer_bytes = num_layers, page_bytes // num_layers
        self._max_pages = budget_bytes // page_bytes
        self._pinned = pinned
        self._changed = threading.Condition()
        self._fetches: dict[str, _Fetch] = {}
        self._asked_s: dict[str, float] = {}
        self._num_pages = 0
        self._rests_until_s = 0.0
        self._is_late = False
        self._pages_per_s: float | None = None
        self.late_fetches = 0
        """Requests whose pages were on their way when they were wanted, and not here."""
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tq-store-fetch")

    def begin(self, rid: str, hashes: Sequence[str]) -> int:
        """How many of these pages a request will find; they are on their way when this returns.

        Asks the store, and waits for its answer, the first time that a request is looked up. For a while
        after pages were late it is not asked, and promises nothing.
        """
        with self._changed:
            known = self._fetches.get(rid)
            if known is not None and (promised := self._promised(known, hashes)) is not None:
                return promised
            self._forget_misses()
            if rid in self._asked_s or time.monotonic() < self._rests_until_s:
                return 0
        found = self._store.count_present(hashes)
        with self._changed:
            self._drop(rid)
            self._make_room(found)
            num_pages = min(found, self._max_pages - self._num_pages)
            if not num_pages:
                self._asked_s[rid] = time.monotonic()
                return 0
            fetch = self._fetches[rid] = _Fetch(hashes[:num_pages])
            self._num_pages += num_pages
            promised = self._in_time(fetch)
        self._threads.submit(self._run, fetch)
        return promised

    def take(self, rid: str, hashes: Sequence[str]) -> torch.Tensor | None:
        """Bytes ``[layers, n, layer_bytes]`` of n pages that were promised, or None if one is late.

        Args:
            rid: The request, whose pages are forgotten.
            hashes: Pages.
        """
        with self._changed:
            fetch = self._fetches.get(rid)
            if fetch is None or not hashes or hashes[0] not in fetch.hashes:
                return None
            first = fetch.hashes.index(hashes[0])
            end = first + len(hashes)
            left_s = fetch.promised_s + self._wait_s - time.monotonic()
            self._changed.wait_for(lambda: fetch.num_here >= end or fetch.is_over, max(0.0, left_s))
            is_here = fetch.num_here >= end and fetch.hashes[first:end] == list(hashes)
            memory, is_late = fetch.memory, fetch.num_here < end and not fetch.is_over
            self._drop(rid)
            self._note(fetch, is_late)
            if memory is None or not is_here:
                return None
            self._release(fetch)  # it is the caller's, whatever is still written to its other pages
        return memory[:, first:end]

    def clear(self) -> None:
        """Forget all pages."""
        with self._changed:
            self._asked_s.clear()
            for rid in list(self._fetches):
                self._drop(rid)

    def close(self) -> None:
        """Forget all pages, and wait until nothing is on its way."""
        self.clear()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, fetch: _Fetch) -> None:
        with self._changed:
            if fetch.is_dropped:
                return
            fetch.is_running = True
        try:
            self._fill(fetch)
        except Exception:
            logger.exception("a fetch failed in us, which is a miss")
        finally:
            with self._changed:
                fetch.is_running, fetch.is_over = False, True
                if fetch.is_dropped:
                    fetch.memory = None
                    self._release(fetch)
                self._changed.notify_all()

    def _fill(self, fetch: _Fetch) -> None:
        shape = (self._num_layers, len(fetch.hashes), self._layer_bytes)
        memory = fetch.memory = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

        def take(position: int, stored: memoryview) -> bool:
            layers = np.frombuffer(stored, dtype=np.uint8).reshape(self._num_layers, self._layer_bytes)
            memory[:, position].numpy()[...] = layers
            with self._changed:
                fetch.num_here += 1
                fetch.arrived_s = time.monotonic()
                self._changed.notify_all()
                return not fetch.is_dropped

        self._store.fetch(fetch.hashes, take)

    def _promised(self, fetch: _Fetch, hashes: Sequence[str]) -> int | None:
        """How many of these pages a fetch can promise from now on; None where it says nothing of them."""
        if not hashes or hashes[0] not in fetch.hashes:
            return None
        fetch.promised_s = time.monotonic()
        first = fetch.hashes.index(hashes[0])
        return min(max(0, self._in_time(fetch) - first), len(hashes))

    def _in_time(self, fetch: _Fetch) -> int:
        """Leading pages of a fetch that are here, or will be when a request has waited as long as it may."""
        if fetch.is_over or not self._wait_s:
            return fetch.num_here
        if self._pages_per_s is None:
            return len(fetch.hashes)
        coming = max(1, int(_SURE * self._pages_per_s * self._wait_s))
        return min(fetch.num_here + coming, len(fetch.hashes))

    def _note(self, fetch: _Fetch, is_late: bool) -> None:
        """Learn from a fetch whose pages were wanted now."""
        was_late, self._is_late = self._is_late, is_late
        now_s = time.monotonic()
        if is_late:
            self._pages_per_s = fetch.pages_per_s(now_s)
            self.late_fetches += 1
            self._rests_until_s = now_s + _REST_S
            if not was_late:
                logger.warning("pages from the store are late, so requests go on without; see load_wait")
        elif fetch.num_here:
            pace = fetch.pages_per_s(fetch.arrived_s)
            known = pace if self._pages_per_s is None else self._pages_per_s
            self._pages_per_s = max(known, (known + pace) / 2)  # few pages say little of how fast many come

    def _forget_misses(self) -> None:
        """Forget which requests the store had nothing for, oldest first, a while after it was asked."""
        until_s = time.monotonic() - _MISS_LASTS_S
        while self._asked_s and self._asked_s[oldest := next(iter(self._asked_s))] <= until_s:
            del self._asked_s[oldest]

    def _make_room(self, num_pages: int) -> None:
        for rid, fetch in list(self._fetches.items()):
            if self._num_pages + num_pages <= self._max_pages:
                return
            if not fetch.is_running:
                self._drop(rid)

    def _drop(self, rid: str) -> None:
        fetch = self._fetches.pop(rid, None)
        if fetch is not None:
            fetch.is_dropped = True
            if not fetch.is_running:
                self._release(fetch)

    def _release(self, fetch: _Fetch) -> None:
        """Count its memory no more."""
        self._num_pages -= fetch.counted_pages
        fetch.counted_pages = 0
