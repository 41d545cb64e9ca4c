"""PageStore: SGLang's pages in tq-store, with every failure a miss."""

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial

import torch

from tq_connectors.reshard import join_pages
from tq_connectors.sglang.page_blocks import PageBlocks
from tq_connectors.sglang.page_codecs import PageCodec
from tq_connectors.sglang.page_names import PageNames
from tq_connectors.store_guard import StoreGuard
from tq_store.block import HEADER_BYTES, HEADER_LAYOUT, parse_header, payload_of
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, IdentityMismatch, RpcError
from tq_store.keys import Part
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome, PutOutcome

logger = logging.getLogger(__name__)

_WHAT = slice(HEADER_LAYOUT["codec_fingerprint"][0], HEADER_LAYOUT["header_checksum"][0])
"""What a header says besides whose block it is."""

_MOST_AT_ONCE_BYTES = 16 << 20
"""Of stored pages in a batch: each one costs some waits for the interpreter's lock, and the store makes one
while this process takes another."""
_MOST_AT_ONCE = 256

PageAt = Callable[[int], torch.Tensor]
"""The page at a position of a call, as `PageCodec` sees pages."""


@dataclasses.dataclass(slots=True)
class PageCounters:
    """What was moved and what went wrong since the start, in pages and bytes of blocks."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    failed_pages: int = 0
    """Pages asked for that were not there, late, not sound or no longer wanted."""
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
        self._load_threads = load_threads
        self._threads = ThreadPoolExecutor(load_threads, thread_name_prefix="tq-store-load")
        self._known_headers: dict[Part, bytes] = {}
        self._loaded_blocks = PageBlocks(names, codec, names.loaded_parts)
        self._saved_blocks = PageBlocks(names, codec, names.saved_parts)
        header_bytes = HEADER_BYTES * len(names.loaded_parts)
        self._loaded_page_bytes = self.stored_page_bytes + header_bytes
        in_staging = staging_bytes // (page_bytes * load_threads)
        at_once = _MOST_AT_ONCE_BYTES // self.stored_page_bytes
        self._most_at_once = max(1, min(_MOST_AT_ONCE, in_staging, at_once))
        self._lock = threading.Lock()
        self.guard = StoreGuard()
        self.counters = PageCounters()

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
        run = max(1, -(-len(hashes) // self._load_threads))
        runs: list[Future[list[bool]]] = []
        try:
            for start in range(0, len(hashes), run):
                pages = partial(_shifted, page_at, start)
                runs.append(self._threads.submit(self._load, hashes[start : start + run], pages))
        finally:
            wait(runs)
        is_filled = [each for done in runs for each in done.result()]
        first_miss = is_filled.index(False) if False in is_filled else len(hashes)
        return [True] * first_miss + [False] * (len(hashes) - first_miss)

    def _load(self, hashes: Sequence[str], page_at: PageAt) -> list[bool]:
        num_filled = 0

        def receive() -> None:
            nonlocal num_filled
            for num_pages in self._fill(hashes, page_at):
                num_filled += num_pages

        self.guard.attempt(receive)
        with self._lock:
            self.counters.loaded_pages += num_filled
            self.counters.loaded_bytes += num_filled * self._loaded_page_bytes
            self.counters.failed_pages += len(hashes) - num_filled
        return [True] * num_filled + [False] * (len(hashes) - num_filled)

    def _fill(self, hashes: Sequence[str], page_at: PageAt) -> Iterator[int]:
        """Fill the leading pages that are sound, a batch at a time; how many of each."""
        parts_of_page = len(self._names.loaded_parts)
        keys = self._names.keys(hashes, self._names.loaded_parts)
        pages: list[torch.Tensor] = []
        stored: torch.Tensor | None = None
        is_over = False

        def batches() -> Iterator[list[PlacedBlock]]:
            nonlocal stored
            for start, end in self._batches(len(hashes)):
                if is_over:
                    return
                pages[:] = map(page_at, range(start, end))
                pieces = self._pieces(pages)
                if pieces is None:
                    if stored is None:
                        stored = self._codec.empty(min(self._most_at_once, len(hashes)))
                    pieces = _rows(stored[: len(pages)])
                yield self._loaded_blocks.of(keys[start * parts_of_page : end * parts_of_page], pieces)

        with closing(self._client.get_into(keys, batches())) as answers:
            for outcomes in answers:
                is_sound = [outcome is GetOutcome.FILLED for outcome in outcomes]
                num_pages = [*is_sound, False].index(False) // parts_of_page
                if stored is not None and num_pages:
                    self._codec.unpack(stored[:num_pages], pages[:num_pages])
                yield num_pages
                is_over = num_pages < len(pages)
                self._note_unlike(outcomes)

    def _note_unlike(self, outcomes: Sequence[GetOutcome]) -> None:
        num_unlike = outcomes.count(GetOutcome.UNLIKE)
        if num_unlike:
            with self._lock:
                self.counters.rejected_blocks += num_unlike
            logger.warning(
                "%d blocks hold something else than their keys promise, which is a miss", num_unlike
            )

    def _batches(self, num_pages: int) -> Iterator[tuple[int, int]]:
        """Where each batch of pages begins and ends: as few as may be, of about the same length."""
        num_batches = -(-num_pages // self._most_at_once)
        cuts = [num_pages * batch // max(1, num_batches) for batch in range(num_batches + 1)]
        return itertools.pairwise(cuts)

    def _pieces(self, pages: Sequence[torch.Tensor]) -> list[list[memoryview]] | None:
        """Where the bytes of each page lie in it; None where they have to be made."""
        pieces = [own for page in pages if (own := self._codec.pieces(page)) is not None]
        return pieces if len(pieces) == len(pages) else None

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
            for position, stored in self._get(hashes):
                taken += 1
                if not take(position, stored):
                    return

        self.guard.attempt(receive)
        with self._lock:
            self.counters.loaded_pages += taken
            self.counters.failed_pages += len(hashes) - taken
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
            with self._lock:
                self.counters.present_pages += sum(is_saved)
            for start, end in self._batches(len(missing)):
                self._put(hashes, missing[start:end], page_at, is_saved)

        self.guard.attempt(send)
        with self._lock:
            self.counters.refused_pages += len(hashes) - sum(is_saved)
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
        part = self._names.shard.part
        return self._codec.section_bytes * part.num_layers * part.num_kv_heads

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
        with self._lock:
            own = dataclasses.asdict(self.counters)
        return {**self._client.counters, **own, "skipped_calls": self.guard.skipped_calls}

    def _get(self, hashes: Sequence[str]) -> Iterator[tuple[int, memoryview]]:
        """Position and bytes of the leading pages that are sound, each as soon as it has arrived."""
        parts, shard = self._names.loaded_parts, self._names.shard
        keys = self._names.keys(hashes, parts)
        pieces: list[tuple[Part, memoryview]] = []
        for number, block in self._client.get(keys):
            position, part = number // len(parts), parts[number % len(parts)]
            if block is None or (payload := self._checked(hashes[position], part, block)) is None:
                return
            pieces.append((part, payload))
            if len(pieces) == len(parts):
                if part != shard.part:
                    payload = join_pages(pieces, shard.part, section_bytes=self._codec.section_bytes)
                yield position, payload
                pieces = []

    def _checked(self, page_hash: str, part: Part, block: bytes) -> memoryview | None:
        """Payload of a block that is what its key promises; its checksums and its key have been verified."""
        what = block[_WHAT]  # the same in all pages of a part, so it is parsed and compared once
        try:
            if what != self._known_headers.get(part):
                if parse_header(block) != self._codec.info(self._names.page_key(page_hash), part):
                    raise IdentityMismatch("the block holds something else than its key promises")
                self._known_headers[part] = what
        except BlockFormatError as error:
            with self._lock:
                self.counters.rejected_blocks += 1
            logger.warning("a page in the store is a miss: %s", error)
            return None
        with self._lock:
            self.counters.loaded_bytes += len(block)
        return payload_of(block)

    def _put(
        self, hashes: Sequence[str], positions: Sequence[int], page_at: PageAt, is_saved: list[bool]
    ) -> None:
        """Save some pages."""
        parts_of_page = len(self._names.saved_parts)
        pages = [page_at(position) for position in positions]
        pieces = self._pieces(pages) or _rows(self._codec.pack(pages))
        keys = self._names.keys([hashes[position] for position in positions], self._names.saved_parts)
        outcomes = self._client.put_from(self._saved_blocks.of(keys, pieces))
        for number, position in enumerate(positions):
            of_page = outcomes[number * parts_of_page : (number + 1) * parts_of_page]
            is_saved[position] = all(each in (PutOutcome.STORED, PutOutcome.PRESENT) for each in of_page)
        with self._lock:
            self.counters.saved_pages += sum(is_saved[position] for position in positions)


def _rows(stored: torch.Tensor) -> list[list[memoryview]]:
    """Each row of bytes, in one piece."""
    return [[row.data] for row in stored.numpy()]


def _shifted(page_at: PageAt, start: int, position: int) -> torch.Tensor:
    """The page at a position of a run."""
    return page_at(start + position)
