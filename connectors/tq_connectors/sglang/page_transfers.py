"""PageTransfers: SGLang's pages to blocks of the store and back, in batches; what fails raises."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch

from tq_connectors.reshard import join_pages
from tq_connectors.sglang.page_blocks import PageBlocks
from tq_connectors.sglang.page_codecs import PageCodec
from tq_connectors.sglang.page_counters import PageCounters
from tq_connectors.sglang.page_names import PageNames
from tq_store.block import HEADER_LAYOUT, parse_header, payload_of
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, IdentityMismatch
from tq_store.keys import Part
from tq_store.placed import Copy, PlacedBlock
from tq_store.results import GetOutcome, PutOutcome

logger = logging.getLogger(__name__)

_WHAT = slice(HEADER_LAYOUT["codec_fingerprint"][0], HEADER_LAYOUT["header_checksum"][0])
"""What a header says besides whose block it is."""

_MOST_AT_ONCE_BYTES = 16 << 20
"""Of stored pages in a batch: each one costs some waits for the interpreter's lock."""
_MOST_AT_ONCE = 256

PageAt = Callable[[int], torch.Tensor]
"""The page at a position of a call, as `PageCodec` sees pages."""


class PageTransfers:
    """Safe to use from several threads.

    Args:
        client: Connection to the store.
        names: Gives pages their keys.
        codec: Makes blocks of pages.
        counters: Where blocks and saved pages are counted.
        staging_pages: Most pages that are packed or unpacked at once; one at least.
    """

    def __init__(
        self,
        client: StoreClient,
        names: PageNames,
        codec: PageCodec,
        counters: PageCounters,
        *,
        staging_pages: int,
    ) -> None:
        self._client, self._names, self._codec, self._counters = client, names, codec, counters
        self._known_headers: dict[Part, bytes] = {}
        self._loaded_blocks = PageBlocks(names, codec, names.loaded_parts)
        self._saved_blocks = PageBlocks(names, codec, names.saved_parts)
        at_once = _MOST_AT_ONCE_BYTES // self.stored_page_bytes
        self._most_at_once = max(1, min(_MOST_AT_ONCE, staging_pages, at_once))

    @property
    def stored_page_bytes(self) -> int:
        """Bytes of the pages of this process in the store, without headers."""
        part = self._names.shard.part
        return self._codec.section_bytes * part.num_layers * part.num_kv_heads

    def fill(self, hashes: Sequence[str], page_at: PageAt) -> Iterator[int]:
        """Fill the leading pages that are sound, a batch at a time; how many of each.

        Raises:
            RpcError: On the way, after any number of batches.
        """
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
                asked = keys[start * parts_of_page : end * parts_of_page]
                copies = self._copies(pages)
                if copies is not None:
                    yield self._loaded_blocks.copied(asked, copies)
                    continue
                pieces = self._pieces(pages)
                if pieces is None:
                    if stored is None:
                        stored = self._codec.empty(min(self._most_at_once, len(hashes)))
                    pieces = _rows(stored[: len(pages)])
                yield self._loaded_blocks.of(asked, pieces)

        with closing(self._client.get_into(keys, batches())) as answers:
            for outcomes in answers:
                is_sound = [outcome is GetOutcome.FILLED for outcome in outcomes]
                num_pages = [*is_sound, False].index(False) // parts_of_page
                if stored is not None and num_pages:
                    self._codec.unpack(stored[:num_pages], pages[:num_pages])
                yield num_pages
                is_over = num_pages < len(pages)
                self._note_unlike(outcomes)

    def get(self, hashes: Sequence[str]) -> Iterator[tuple[int, memoryview]]:
        """Position and bytes of the leading pages that are sound, each as soon as it has arrived.

        Raises:
            RpcError: On the way, after any number of pages.
        """
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

    def put(self, hashes: Sequence[str], page_at: PageAt) -> Iterator[int]:
        """Save pages, a batch at a time; the position of each whose parts the store has now.

        Raises:
            RpcError: On the way; nothing is known of the batch.
        """
        parts_of_page = len(self._names.saved_parts)
        for start, end in self._batches(len(hashes)):
            pages = [page_at(position) for position in range(start, end)]
            pieces = self._pieces(pages) or _rows(self._codec.pack(pages))
            keys = self._names.keys(hashes[start:end], self._names.saved_parts)
            outcomes = self._client.put_from(self._saved_blocks.of(keys, pieces))
            is_there = [outcome in (PutOutcome.STORED, PutOutcome.PRESENT) for outcome in outcomes]
            saved = [
                start + number
                for number in range(end - start)
                if all(is_there[number * parts_of_page : (number + 1) * parts_of_page])
            ]
            self._counters.add(saved_pages=len(saved))
            yield from saved

    def _note_unlike(self, outcomes: Sequence[GetOutcome]) -> None:
        num_unlike = outcomes.count(GetOutcome.UNLIKE)
        if num_unlike:
            self._counters.add(rejected_blocks=num_unlike)
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

    def _copies(self, pages: Sequence[torch.Tensor]) -> list[Copy] | None:
        """What copies each page to its place; None where nothing does, or blocks are parts of pages."""
        if not self._loaded_blocks.are_pages:
            return None
        copies = [copy for page in pages if (copy := self._codec.copy_to(page)) is not None]
        return copies if len(copies) == len(pages) else None

    def _checked(self, page_hash: str, part: Part, block: bytes) -> memoryview | None:
        """Payload of a block that is what its key promises; its checksums and its key have been verified."""
        what = block[_WHAT]  # the same in all pages of a part, so it is parsed and compared once
        try:
            if what != self._known_headers.get(part):
                if parse_header(block) != self._codec.info(self._names.page_key(page_hash), part):
                    raise IdentityMismatch("the block holds something else than its key promises")
                self._known_headers[part] = what
        except BlockFormatError as error:
            self._counters.add(rejected_blocks=1)
            logger.warning("a page in the store is a miss: %s", error)
            return None
        self._counters.add(loaded_bytes=len(block))
        return payload_of(block)


def _rows(stored: torch.Tensor) -> list[list[memoryview]]:
    """Each row of bytes, in one piece."""
    return [[row.data] for row in stored.numpy()]
