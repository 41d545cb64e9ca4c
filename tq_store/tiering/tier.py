"""One level of the store: a backend whose failures are values, with a write-behind queue in front."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from typing import TypeVar

from tq_store.backends.base import Backend, Sharded
from tq_store.backends.memory import MemoryBackend
from tq_store.block import HEADER_BYTES, verify_block
from tq_store.coded import is_coded, pack_coded, unpack_coded
from tq_store.errors import (
    BackendBusy,
    BackendError,
    BackendFull,
    BlockFormatError,
    UnknownOwner,
    UnsupportedVersion,
)
from tq_store.keys import BlockKey
from tq_store.results import BackendStats, PutOutcome, QueueStats, ShardStats

_T = TypeVar("_T")

Verify = Callable[[bytes, BlockKey], object]
"""Given a block and its key: raises BlockFormatError where they do not belong together."""
Watch = Callable[[str, str, int], AbstractContextManager[None]]
"""Given a tier's name, an operation and a number of keys: the context in which the medium does it."""


def unwatched(_tier: str, _operation: str, _num_keys: int) -> AbstractContextManager[None]:
    """Nobody measures or traces."""
    return nullcontext()


_REST_S = 1.0
"""How long a failing tier is left alone; then one call tries it, and only that one waits for its timeout."""
_BATCH_BYTES = 16 << 20
_INLINE_BYTES = (4 << 20) + HEADER_BYTES
"""Hashing more than this would hold up the event loop, so a thread does it; for less that takes longer."""

_log = logging.getLogger(__name__)


class Tier:
    """Calls a backend, checks what comes out of it and turns what goes wrong into misses and refusals.

    Bound to one event loop. An outage is logged when it begins and when it ends. Owns the backend and the
    task that empties the queue; `close` ends both.

    Args:
        backend: The medium.
        queue_bytes: Blocks that may wait to be written; what does not fit is dropped and counted.
        counters: Where to count; shared with the store.
        clock: Seconds, monotonic.
        watch: Wraps each call to the medium.
        verify: Raises BlockFormatError for a block that is not sound, or not of its key.
        coded: Whether to compress what is written; what is read may be coded or not.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        queue_bytes: int,
        counters: Counter[str],
        clock: Callable[[], float],
        watch: Watch = unwatched,
        verify: Verify = verify_block,
        coded: bool = False,
    ) -> None:
        self.name = backend.name
        self._coded = coded
        self._verify = verify
        self._watch = watch
        self._backend = backend
        self._counters = counters
        self._clock = clock
        self._rests_until = clock()
        self._troubles: set[str] = set()
        self._queue: dict[BlockKey, bytes] = {}
        self._queue_bytes = 0
        self._max_queue_bytes = queue_bytes
        self._writing = asyncio.Lock()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def queue(self) -> QueueStats:
        """What waits to be written, and what is being written."""
        return QueueStats(
            num_blocks=len(self._queue), used_bytes=self._queue_bytes, limit_bytes=self._max_queue_bytes
        )

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there."""
        missing = [False] * len(keys)
        if not keys or self._rests():
            return missing
        return await self._attempt("contains", len(keys), self._backend.contains(keys), missing)

    def sizes_at_hand(self, keys: Sequence[BlockKey]) -> list[int]:
        """Lengths of the leading blocks that are in this process's own memory; none for another medium."""
        return self._backend.sizes_bytes(keys) if isinstance(self._backend, MemoryBackend) else []

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Blocks that are sound, or None; one that is not goes to quarantine.

        A block of a version or of a tenant that we do not know stays: other servers on the same medium may
        need it. Blocks in this process's own memory were checked on their way in and are not checked again.
        """
        missing: list[bytes | None] = [None] * len(keys)
        if not keys or self._rests():
            return missing
        blocks = await self._attempt("get", len(keys), self._backend.get(keys), missing)
        if isinstance(self._backend, MemoryBackend):
            return blocks
        blocks, unfit = await self._unpacked(keys, blocks)
        found = [(key, block) for key, block in zip(keys, blocks, strict=True) if block is not None]
        checks = zip(found, await check_all(found, self._verify), strict=True)
        unfit |= {key: error for (key, _), error in checks if error}
        for key, error in unfit.items():
            if isinstance(error, UnsupportedVersion):
                self._counters["unsupported"] += 1
                continue
            if isinstance(error, UnknownOwner):
                continue
            self._counters["quarantined"] += 1
            _log.warning("corrupt block %s in the %s tier: %s", key.hex()[64:80], self.name, error)
            await self._attempt("quarantine", 1, self._backend.quarantine(key), None)
        return [None if key in unfit else block for key, block in zip(keys, blocks, strict=True)]

    async def _unpacked(
        self, keys: Sequence[BlockKey], blocks: list[bytes | None]
    ) -> tuple[list[bytes | None], dict[BlockKey, BlockFormatError]]:
        """Blocks as they were before they were coded; for those that are damaged, what is wrong."""
        if not any(block is not None and is_coded(block) for block in blocks):
            return blocks, {}
        plain = await asyncio.to_thread(lambda: [_unpacked(block) for block in blocks])
        unfit = {
            key: each for key, each in zip(keys, plain, strict=True) if isinstance(each, BlockFormatError)
        }
        return [None if isinstance(each, BlockFormatError) else each for each in plain], unfit

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Store blocks now."""
        refused = [PutOutcome.REFUSED] * len(blocks)
        if not blocks or self._rests():
            return refused
        if self._coded:
            blocks = await asyncio.to_thread(lambda: [(key, pack_coded(block)) for key, block in blocks])
        outcomes = await self._attempt("put", len(blocks), self._backend.put(blocks), refused)
        if PutOutcome.STORED in outcomes:
            self._end_trouble("full")
        return outcomes

    def put_later(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> None:
        """Queue blocks to be written; what is over the queue's bytes is dropped and counted."""
        for key, block in blocks:
            if key in self._queue:
                continue
            if self._closed or self._queue_bytes + len(block) > self._max_queue_bytes:
                self._counters["dropped_writes"] += 1
                continue
            self._queue[key] = block
            self._queue_bytes += len(block)
        if self._queue and (self._writer is None or self._writer.done()):
            # in a context of its own: what is written later belongs to no one call
            self._writer = asyncio.create_task(self._write_queue(), context=Context())

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove blocks, waiting ones included; waits for the batch being written."""
        async with self._writing:
            self._unqueue(self._queue.keys() & set(keys))
            deletion = self._backend.delete(keys)
            return await self._attempt("delete", len(keys), deletion, [False] * len(keys))

    async def purge(self, namespace: bytes | None) -> int | None:
        """Remove the blocks of a namespace digest, or all; as `delete`, but None where the medium failed."""
        async with self._writing:
            self._unqueue([key for key in self._queue if namespace is None or key.startswith(namespace)])
            return await self._attempt("purge", 0, self._backend.purge(namespace), None)

    async def stats(self) -> BackendStats | None:
        """What the medium holds, or None while it fails."""
        if self._rests():
            return None
        return await self._attempt("stats", 0, self._backend.stats(), None)

    def shards(self) -> list[ShardStats]:
        """How the servers of the medium behave; none where it is not made of servers."""
        return self._backend.shards() if isinstance(self._backend, Sharded) else []

    async def flush(self) -> None:
        """Wait until nothing waits to be written."""
        if self._writer is not None:
            await asyncio.wait([self._writer])

    async def close(self) -> None:
        """Write what waits, then close the backend."""
        self._closed = True
        await self.flush()
        await self._backend.close()

    async def _write_queue(self) -> None:
        while self._queue:
            async with self._writing:
                batch = self._next_batch()
                try:
                    # where replicas share a medium, asking first saves sending what another has sent
                    present = await self.contains([key for key, _ in batch])
                    absent = [item for item, there in zip(batch, present, strict=True) if not there]
                    outcomes = await self.put(absent)
                    self._counters["dropped_writes"] += outcomes.count(PutOutcome.REFUSED)
                finally:
                    # only now, so that the limit covers what is being written as well
                    self._queue_bytes -= sum(len(block) for _, block in batch)

    def _next_batch(self) -> list[tuple[BlockKey, bytes]]:
        batch: list[tuple[BlockKey, bytes]] = []
        batch_bytes = 0
        for key, block in self._queue.items():
            if batch and batch_bytes + len(block) > _BATCH_BYTES:
                break
            batch.append((key, block))
            batch_bytes += len(block)
        for key, _ in batch:
            del self._queue[key]
        return batch

    def _unqueue(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._queue_bytes -= len(self._queue.pop(key))

    def _rests(self) -> bool:
        """Whether to leave the tier alone; while it fails, who is told otherwise is the one to try it."""
        if self._clock() < self._rests_until:
            return True
        if "failing" in self._troubles:
            self._rests_until = self._clock() + _REST_S
        return False

    async def _attempt(self, operation: str, num_keys: int, call: Awaitable[_T], otherwise: _T) -> _T:
        try:
            with self._watch(self.name, operation, num_keys):
                result = await call
        except BackendError as error:
            self._counters[f"tier_errors_{self.name}"] += 1
            trouble = _trouble(error)
            if trouble == "failing":
                self._rests_until = self._clock() + _REST_S
            if trouble not in self._troubles:
                self._troubles.add(trouble)
                _log.warning("the %s tier is %s: %s", self.name, trouble, error)
            return otherwise
        for trouble in ("failing", "busy"):
            self._end_trouble(trouble)
        return result

    def _end_trouble(self, trouble: str) -> None:
        if trouble in self._troubles:
            self._troubles.remove(trouble)
            self._rests_until = self._clock()
            _log.info("the %s tier is no longer %s", self.name, trouble)


def _trouble(error: BackendError) -> str:
    """Only a tier that is failing is left alone: one that is full still reads, one that is busy works."""
    if isinstance(error, BackendFull):
        return "full"
    return "busy" if isinstance(error, BackendBusy) else "failing"


def _unpacked(block: bytes | None) -> bytes | BlockFormatError | None:
    if block is None or not is_coded(block):
        return block
    try:
        return unpack_coded(block)
    except BlockFormatError as error:
        return error


async def check_all(
    blocks: Sequence[tuple[BlockKey, bytes]], verify: Verify
) -> list[BlockFormatError | None]:
    """What is wrong with each block, or None; hashes much in a thread, little at once."""
    if sum(len(block) for _, block in blocks) > _INLINE_BYTES:
        return await asyncio.to_thread(_check_all, blocks, verify)
    return _check_all(blocks, verify)


def _check_all(blocks: Sequence[tuple[BlockKey, bytes]], verify: Verify) -> list[BlockFormatError | None]:
    return [_check(key, block, verify) for key, block in blocks]


def _check(key: BlockKey, block: bytes, verify: Verify) -> BlockFormatError | None:
    try:
        verify(block, key)
    except BlockFormatError as error:
        return error
    return None
