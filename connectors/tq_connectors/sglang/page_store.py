"""PageStore: SGLang's pages in tq-store, with every failure a miss."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from tq_connectors.sglang.page_codecs import PageCodec
from tq_connectors.sglang.page_names import PageNames
from tq_connectors.store_guard import StoreGuard
from tq_store.block import pack_block, parse_header, payload_of
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, IdentityMismatch
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

logger = logging.getLogger(__name__)

PageAt = Callable[[int], torch.Tensor]
"""The page at a position of a call, as `PageCodec` sees pages."""


@dataclasses.dataclass(slots=True)
class PageCounters:
    """What was moved and what went wrong since the start, in pages and bytes of blocks."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    failed_pages: int = 0
    """Pages asked for that were not there, late or not sound."""
    saved_pages: int = 0
    present_pages: int = 0
    """Pages to save that the store had."""
    refused_pages: int = 0
    """Pages to save that the store did not take."""
    rejected_blocks: int = 0
    """Sound blocks that were not what their key promises."""


class PageStore:
    """Pages by SGLang's hashes. Blocks until the client's deadlines; safe to use from several threads.

    Args:
        client: Connection to the store; owned by the caller.
        names: Gives pages their keys.
        codec: Makes blocks of pages.
        page_bytes: Bytes of a page in the engine.
        staging_bytes: Most bytes of pages that are packed or unpacked at once; one page at least.
    """

    def __init__(
        self, client: StoreClient, names: PageNames, codec: PageCodec, *, page_bytes: int, staging_bytes: int
    ) -> None:
        self._client = client
        self._names = names
        self._codec = codec
        self._pages_at_once = max(1, staging_bytes // page_bytes)
        self._lock = threading.Lock()
        self.guard = StoreGuard()
        self.counters = PageCounters()

    def count_present(self, hashes: Sequence[str]) -> int:
        """How many leading pages the store has; one round trip, and 0 where it does not answer."""
        return self.guard.attempt(lambda: self._client.lookup(self._names.keys(hashes))) or 0

    def load(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        """Fill the leading pages that the store has; True for each that was filled.

        Stops at the first page that is missing, late or not sound; memory of later pages may be written.
        """
        is_filled = [False] * len(hashes)
        keys = self._names.keys(hashes)

        def fill() -> None:
            waiting: list[tuple[int, memoryview]] = []
            try:
                for position, payload in self._payloads(keys):
                    waiting.append((position, payload))
                    if len(waiting) == self._pages_at_once:
                        self._unpack(waiting, page_at, is_filled)
                        waiting = []
            finally:
                self._unpack(waiting, page_at, is_filled)

        self.guard.attempt(fill)
        with self._lock:
            self.counters.failed_pages += len(hashes) - sum(is_filled)
        return is_filled

    def save(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        """Save pages; True where the store has the page afterwards. Their memory is not read after this."""
        is_saved = [False] * len(hashes)
        keys = self._names.keys(hashes)

        def send() -> None:
            is_saved[:] = self._client.contains(keys)
            missing = [position for position, is_present in enumerate(is_saved) if not is_present]
            with self._lock:
                self.counters.present_pages += sum(is_saved)
            for start in range(0, len(missing), self._pages_at_once):
                group = missing[start : start + self._pages_at_once]
                outcomes = self._client.put(self._blocks(keys, group, page_at))
                for position, outcome in zip(group, outcomes, strict=True):
                    is_saved[position] = outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
                with self._lock:
                    self.counters.saved_pages += sum(is_saved[position] for position in group)

        self.guard.attempt(send)
        with self._lock:
            self.counters.refused_pages += len(hashes) - sum(is_saved)
        return is_saved

    def purge(self) -> bool:
        """Remove all pages of this process's namespace; False where the store does not answer."""
        return self.guard.attempt(lambda: self._client.purge(self._names.namespace.digest())) is not None

    def count_everything(self) -> dict[str, int]:
        """Counters of pages, of the connection, and of calls that were not made."""
        with self._lock:
            own = dataclasses.asdict(self.counters)
        return {**self._client.counters, **own, "skipped_calls": self.guard.skipped_calls}

    def _payloads(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, memoryview]]:
        """Position and payload of the leading pages that are sound, each as soon as it has arrived."""
        for position, block in self._client.get(keys):
            if block is None:
                return
            try:
                if parse_header(block) != self._codec.info(keys[position]):
                    raise IdentityMismatch("the block holds something else than its key promises")
            except BlockFormatError as error:
                with self._lock:
                    self.counters.rejected_blocks += 1
                logger.warning("a page in the store is a miss: %s", error)
                return
            with self._lock:
                self.counters.loaded_bytes += len(block)
            yield position, payload_of(block)

    def _unpack(
        self, waiting: Sequence[tuple[int, memoryview]], page_at: PageAt, is_filled: list[bool]
    ) -> None:
        if not waiting:
            return
        self._codec.unpack(
            [payload for _, payload in waiting], [page_at(position) for position, _ in waiting]
        )
        for position, _ in waiting:
            is_filled[position] = True
        with self._lock:
            self.counters.loaded_pages += len(waiting)

    def _blocks(
        self, keys: Sequence[BlockKey], positions: Sequence[int], page_at: PageAt
    ) -> list[tuple[BlockKey, bytes]]:
        """Made before any is sent, because a call that fails may be read by its connection for a while."""
        payloads = self._codec.pack([page_at(position) for position in positions])
        return [
            (keys[position], pack_block(self._codec.info(keys[position]), payload.numpy().data.cast("B")))
            for position, payload in zip(positions, payloads, strict=True)
        ]
