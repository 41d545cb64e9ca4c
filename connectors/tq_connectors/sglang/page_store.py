"""PageStore: SGLang's pages in tq-store, with every failure a miss."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from tq_connectors.runs_at_once import in_runs
from tq_connectors.sglang.page_codecs import PageCodec
from tq_connectors.sglang.page_counters import PageCounters
from tq_connectors.sglang.page_names import PageNames
from tq_connectors.sglang.page_transfers import PageAt, PageTransfers
from tq_connectors.store_guard import StoreGuard
from tq_store.block import HEADER_BYTES
from tq_store.client import StoreClient
from tq_store.errors import RpcError

logger = logging.getLogger(__name__)


class PageStore:
    """Pages by SGLang's hashes. Blocks until the client's deadlines; safe to use from several threads.

    Args:
        client: Connection to the store; owned by the caller.
        names: Gives pages their keys.
        codec: Makes blocks of pages.
        page_bytes: Bytes of a page in the engine.
        staging_bytes: Most bytes of pages that are packed or unpacked at once; one page at least.
        load_threads: Runs of pages that are loaded at once.
    """

    def __init__(
        self,
        client: StoreClient,
        names: PageNames,
        codec: PageCodec,
        *,
        page_bytes: int,
        staging_bytes: int,
        load_threads: int = 1,
    ) -> None:
        self._client = client
        self._names = names
        self._codec = codec
        self._num_runs = load_threads
        self._threads = ThreadPoolExecutor(load_threads, thread_name_prefix="tq-store-load")
        self.guard = StoreGuard()
        self.counters = PageCounters()
        staging_pages = staging_bytes // (page_bytes * load_threads)
        self._transfers = PageTransfers(client, names, codec, self.counters, staging_pages=staging_pages)
        self._loaded_page_bytes = self.stored_page_bytes + HEADER_BYTES * len(names.loaded_parts)

    def count_present(self, hashes: Sequence[str]) -> int:
        """How many leading pages the store has; one round trip, and 0 where it does not answer."""
        parts = self._names.loaded_parts
        keys = self._names.keys(hashes, parts)
        return (self.guard.attempt(lambda: self._client.lookup(keys)) or 0) // len(parts)

    def load(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        """Fill the leading pages that the store has; True for each that was filled.

        Stops at the first page that is missing, late or not sound; memory of later pages may be written. None
        of it is written after this, whether it returns or raises.
        """

        def load(start: int, run: Sequence[str]) -> list[bool]:
            return self._load(run, partial(_shifted, page_at, start))

        is_filled = in_runs(self._threads, self._num_runs, load, hashes)
        num_filled = is_filled.index(False) if False in is_filled else len(hashes)
        self.counters.add(
            loaded_pages=num_filled,
            loaded_bytes=num_filled * self._loaded_page_bytes,
            failed_pages=len(hashes) - num_filled,
        )
        return [True] * num_filled + [False] * (len(hashes) - num_filled)

    def _load(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        num_filled = 0

        def receive() -> None:
            nonlocal num_filled
            for num_pages in self._transfers.fill(hashes, page_at):
                num_filled += num_pages

        self.guard.attempt(receive)
        return [True] * num_filled + [False] * (len(hashes) - num_filled)

    def fetch(self, hashes: Sequence[str], take: Callable[[int, memoryview], bool]) -> int:
        """Hand over the bytes of the leading pages that the store has, each as soon as it has arrived.

        Args:
            hashes: Pages.
            take: Gets the position and the bytes of a page; says whether the next one is wanted.

        Returns:
            How many pages were handed over; fewer than asked for where one is missing, late or not sound.
        """
        taken = 0

        def receive() -> None:
            nonlocal taken
            for position, stored in self._transfers.get(hashes):
                taken += 1
                if not take(position, stored):
                    return

        self.guard.attempt(receive)
        self.counters.add(loaded_pages=taken, failed_pages=len(hashes) - taken)
        return taken

    def save(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        """Save pages; True where the store has this process's parts of the page afterwards.

        A process whose parts another one saves, or that saves none, has nothing to do. The memory of pages
        is not read after this.
        """
        parts = self._names.saved_parts
        is_saved = [not parts] * len(hashes)
        if not parts:
            return is_saved
        keys = self._names.keys(hashes, parts)

        def send() -> None:
            is_there = self._client.contains(keys)
            by_page = [is_there[start : start + len(parts)] for start in range(0, len(keys), len(parts))]
            is_saved[:] = map(all, by_page)
            missing = [position for position, is_present in enumerate(is_saved) if not is_present]
            self.counters.add(present_pages=sum(is_saved))
            wanted = [hashes[position] for position in missing]
            for number in self._transfers.put(wanted, lambda number: page_at(missing[number])):
                is_saved[missing[number]] = True

        self.guard.attempt(send)
        self.counters.add(refused_pages=len(hashes) - sum(is_saved))
        return is_saved

    @property
    def codec(self) -> PageCodec:
        """What makes blocks of pages."""
        return self._codec

    @property
    def num_layers(self) -> int:
        """Layers of the model that this process holds."""
        return self._names.shard.part.num_layers

    @property
    def stored_page_bytes(self) -> int:
        """Bytes of the pages of this process in the store, without headers."""
        return self._transfers.stored_page_bytes

    def purge(self) -> bool:
        """Remove all pages of this process's namespace; False where the store does not, or may not."""
        try:
            self._client.purge(self._names.namespace.digest())
        except RpcError as error:  # no outage: on another machine, purging takes an admin
            logger.warning("pages stay in the store: %s", error)
            return False
        return True

    def close(self) -> None:
        """Wait until no page is written any more; the client is closed by its owner."""
        self._threads.shutdown()

    def count_everything(self) -> dict[str, int]:
        """Counters of pages, of the connection, and of calls that were not made."""
        own = self.counters.by_name()
        return {**self._client.counters, **own, "skipped_calls": self.guard.skipped_calls}


def _shifted(page_at: PageAt, start: int, position: int) -> torch.Tensor:
    """The page at a position of a run."""
    return page_at(start + position)
