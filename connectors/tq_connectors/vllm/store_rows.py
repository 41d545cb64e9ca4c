"""StoredRows: rows of host memory in the store and back, with every failure a miss."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tq_connectors.store_guard import StoreGuard
from tq_connectors.vllm.rows import Rows
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """A row: the key of its block, and its memory."""

    key: BlockKey
    memory: memoryview


class StoredRows:
    """Rows by block key. Blocks until the client's deadlines; safe to use from any thread.

    Args:
        client: Connection to the store; owned by the caller.
        rows: What a row looks like as a block.
    """

    def __init__(self, client: StoreClient, rows: Rows) -> None:
        self._client, self._rows = client, rows
        self._guard = StoreGuard()
        self.rejected_rows = 0
        """Blocks that came, and were not what their key promises."""

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong: the client's counters, blocks that did not fit, calls that were not made."""
        own = {"rejected_rows": self.rejected_rows, "skipped_calls": self._guard.skipped_calls}
        return {**self._client.counters, **own}

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are there, as far as the store says."""
        return self._guard.attempt(lambda: self._client.contains(keys)) or [False] * len(keys)

    def put(self, rows: Sequence[Row]) -> list[bool]:
        """Store rows that the store lacks; True where it has one afterwards.

        Their memory is read before this returns, and never after.
        """
        is_there = self.contains([row.key for row in rows])
        missing = [number for number, there in enumerate(is_there) if not there]
        outcomes = self._guard.attempt(lambda: self._client.put(self._blocks(rows, missing))) or []
        for number, outcome in zip(missing, outcomes, strict=False):
            is_there[number] = outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
        return is_there

    def get(self, rows: Sequence[Row]) -> list[bool]:
        """Fill rows; True where one was there, sound and in time. The others are as before."""
        is_filled = [False] * len(rows)

        def fill() -> None:
            for number, block in self._client.get([row.key for row in rows]):
                if block is not None:
                    is_filled[number] = self._fill(rows[number], block)

        self._guard.attempt(fill)
        return is_filled

    def _fill(self, row: Row, block: bytes) -> bool:
        try:
            self._rows.unpack(row.key, block, row.memory)
        except BlockFormatError as error:
            self.rejected_rows += 1
            logger.warning("a chunk in the store is a miss: %s", error)
            return False
        return True

    def _blocks(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[tuple[BlockKey, bytes]]:
        for number in numbers:
            yield rows[number].key, self._rows.pack(rows[number].key, rows[number].memory)
