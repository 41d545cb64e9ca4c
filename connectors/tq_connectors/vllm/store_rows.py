"""StoredRows: rows of host memory in the store and back, with every failure a miss."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from tq_connectors.runs_at_once import in_runs
from tq_connectors.store_guard import StoreGuard
from tq_connectors.vllm.rows import Rows
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome, PutOutcome

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
        load_threads: Runs of rows that are loaded at once.
    """

    def __init__(self, client: StoreClient, rows: Rows, *, load_threads: int = 1) -> None:
        self._client, self._rows = client, rows
        self._load_threads = load_threads
        self._threads = ThreadPoolExecutor(load_threads, thread_name_prefix="tq-vllm-rows")
        self._guard = StoreGuard()
        self._lock = threading.Lock()
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
        if not missing:
            return is_there
        outcomes = self._guard.attempt(lambda: self._put([rows[number] for number in missing])) or []
        for number, outcome in zip(missing, outcomes, strict=False):
            is_there[number] = outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
        return is_there

    def get(self, rows: Sequence[Row]) -> list[bool]:
        """Fill rows; True where one was there, sound and in time. The others may hold anything.

        None of them is written after this.
        """
        return in_runs(self._threads, self._load_threads, self._get, rows)

    def close(self) -> None:
        """Wait until no row is written any more; the client is closed by its owner."""
        self._threads.shutdown()

    def _get(self, _: int, rows: Sequence[Row]) -> list[bool]:
        is_filled: list[bool] = []
        self._guard.attempt(lambda: is_filled.extend(self._filled(rows)))
        return is_filled + [False] * (len(rows) - len(is_filled))

    def _filled(self, rows: Sequence[Row]) -> Iterator[bool]:
        keys = [row.key for row in rows]
        blocks = self._placed(rows)
        if blocks is None:
            for number, block in self._client.get(keys):
                yield block is not None and self._fill(rows[number], block)
            return
        with closing(self._client.get_into(keys, [blocks])) as answers:
            for outcomes in answers:
                for outcome in outcomes:
                    if outcome is GetOutcome.UNLIKE:
                        self._note_unlike("it was made by another codec, or for another cache shape")
                    yield outcome is GetOutcome.FILLED

    def _fill(self, row: Row, block: bytes) -> bool:
        try:
            self._rows.unpack(row.key, block, row.memory)
        except BlockFormatError as error:
            self._note_unlike(error)
            return False
        return True

    def _note_unlike(self, why: object) -> None:
        with self._lock:
            self.rejected_rows += 1
        logger.warning("a chunk in the store is a miss: %s", why)

    def _put(self, rows: Sequence[Row]) -> list[PutOutcome]:
        blocks = self._placed(rows)
        if blocks is None:
            return self._client.put((row.key, self._rows.pack(row.key, row.memory)) for row in rows)
        return self._client.put_from(blocks)

    def _placed(self, rows: Sequence[Row]) -> list[PlacedBlock] | None:
        """Where the bytes of rows lie; None where they have to be made."""
        blocks = [placed for row in rows if (placed := self._rows.placed(row.key, row.memory)) is not None]
        return blocks if len(blocks) == len(rows) else None
