"""PageLoader: pages from the store into an engine's blocks, some on their way while others are moved."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from tq_connectors.prefix_cache import PrefixCache
from tq_connectors.vllm.chunk_codec import ChunkCodec, host_cells
from tq_connectors.vllm.chunk_mover import Chunk, ChunkMover
from tq_connectors.vllm.page_moves import PageMove, parts_of
from tq_connectors.vllm.streams import Event

_TRAYS_PER_THREAD = 2
"""One that a thread fills, and one that is moved meanwhile or waits for its turn."""


class PageLoader:
    """Loads one after the other; called from one thread, and asks the store from several of its own.

    Args:
        cache: This rank's view of the store.
        codec: What a page becomes on the device.
        staging_bytes: Most device memory of each of two buffers, but at least one page.
        host_bytes: Host memory for pages on their way; at least one page.
        load_threads: Parts of a load that come at once.
    """

    def __init__(
        self,
        cache: PrefixCache,
        codec: ChunkCodec,
        *,
        staging_bytes: int,
        host_bytes: int,
        load_threads: int,
    ) -> None:
        self._cache, self._load_threads = cache, load_threads
        self.mover = ChunkMover([codec], staging_bytes=staging_bytes, is_save=False)
        """Moves pages to the device, for whom no load is under way."""
        cells = host_cells(codec, host_bytes)
        size = len(cells) // min(len(cells), load_threads * _TRAYS_PER_THREAD)
        self._trays = [tray for tray in cells.split(size) if len(tray) == size]
        self._threads = ThreadPoolExecutor(load_threads, thread_name_prefix="tq-fetch-pages")

    def load(self, pages: Sequence[PageMove], ready: Event, late_at: float) -> int:
        """Number of leading pages that came, sound and in time, and are in their blocks now.

        Blocks of the others may hold anything; none is written after this.

        Args:
            pages: In token order.
            ready: No block is written before.
            late_at: When nothing more is asked for, by the monotonic clock.
        """
        size = max(1, min(len(self._trays[0]), -(-len(pages) // self._load_threads)))
        parts, free, loaded = deque(parts_of(pages, size)), list(self._trays), 0
        on_way: deque[tuple[Sequence[PageMove], torch.Tensor, Future[int]]] = deque()
        try:
            while parts or on_way:
                while parts and free and time.monotonic() < late_at:
                    part, tray = parts.popleft(), free.pop()
                    on_way.append((part, tray, self._threads.submit(self._fetch, part, tray, late_at)))
                if not on_way:
                    break
                part, tray, fetched = on_way.popleft()
                count = fetched.result()
                chunks = [
                    Chunk(0, *each)
                    for each in zip(tray, (page.blocks for page in part[:count]), strict=False)
                ]
                if not self.mover.move(chunks, ready):
                    break
                loaded += count
                if count < len(part):
                    break
                free.append(tray)
        finally:
            fetches = [fetched for *_, fetched in on_way]
            for fetched in fetches:
                fetched.cancel()
            wait(fetches)
        return loaded

    def close(self) -> None:
        """Wait for what runs. May be called twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.mover.close()

    def _fetch(self, pages: Sequence[PageMove], tray: torch.Tensor, late_at: float) -> int:
        """Fill a tray with the leading pages that come; how many. One whose turn is late asks for none."""
        count = 0
        if time.monotonic() >= late_at:
            return count
        for found in self._cache.load([page.key for page in pages]):
            tray[count].numpy()[...] = np.frombuffer(found, np.uint8)  # without the interpreter's lock
            count += 1
        return count
