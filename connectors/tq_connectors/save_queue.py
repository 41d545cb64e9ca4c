"""A bounded queue that puts blocks into the store from a thread of its own."""

import logging
import threading
from collections import deque
from typing import Protocol

from tq_store.errors import RpcError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

logger = logging.getLogger(__name__)

_BLOCKS_PER_CALL = 16


class BlockPutter(Protocol):
    """What the queue needs of a client; `tq_store.client.StoreClient` has it."""

    def put(self, blocks: list[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Store blocks; one outcome for each."""


class SaveQueue:
    """Takes blocks without waiting and puts them in the background.

    When `budget_bytes` are waiting, a new block is dropped and counted: a lost save is a future miss, never a
    stalled engine. Failed puts are counted and logged once an outage. Safe to use from several threads.

    Args:
        client: Where blocks go; owned by the caller.
        budget_bytes: Most bytes that may wait or be on their way.
    """

    def __init__(self, client: BlockPutter, *, budget_bytes: int) -> None:
        self._client = client
        self._budget_bytes = budget_bytes
        self._waiting: deque[tuple[BlockKey, bytes]] = deque()
        self._held_bytes = 0
        self._closed = False
        self._outage = False
        self._changed = threading.Condition()
        self.saved_blocks = 0
        self.dropped_blocks = 0
        self.failed_blocks = 0
        self._thread = threading.Thread(target=self._run, name="tq-store-save", daemon=True)
        self._thread.start()

    def offer(self, key: BlockKey, block: bytes) -> bool:
        """Queue a block; False when there is no room for it or the queue is closed. Never blocks."""
        with self._changed:
            if self._closed or self._held_bytes + len(block) > self._budget_bytes:
                self.dropped_blocks += 1
                return False
            self._waiting.append((key, block))
            self._held_bytes += len(block)
            self._changed.notify_all()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or on its way; False when that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held_bytes == 0, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Put what is queued, as far as `timeout_s` allows, and stop the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self.dropped_blocks += len(self._waiting)
            self._held_bytes -= sum(len(block) for _, block in self._waiting)
            self._waiting.clear()

    def _run(self) -> None:
        while batch := self._next_batch():
            saved = self._put(batch)
            with self._changed:
                self.saved_blocks += saved
                self.failed_blocks += len(batch) - saved
                self._held_bytes -= sum(len(block) for _, block in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[tuple[BlockKey, bytes]]:
        """Blocks for one call; empty when the queue is closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            count = min(len(self._waiting), _BLOCKS_PER_CALL)
            return [self._waiting.popleft() for _ in range(count)]

    def _put(self, batch: list[tuple[BlockKey, bytes]]) -> int:
        """Number of blocks of the batch that the store now has."""
        try:
            outcomes = self._client.put(batch)
        except Exception as error:  # whatever it is, the thread must go on, or all later saves are lost
            if not self._outage:
                logger.warning(
                    "saving to the store fails, blocks are dropped until it works: %s",
                    error,
                    exc_info=not isinstance(error, RpcError),
                )
            self._outage = True
            return 0
        self._outage = False
        return sum(outcome in (PutOutcome.STORED, PutOutcome.PRESENT) for outcome in outcomes)
