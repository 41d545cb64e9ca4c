"""ObjectStore: LMCache's objects in tq-store, with every failure a miss that is counted and logged once."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tq_connectors.envelope import StoredObject, pack_object, unpack_object
from tq_store.block import Buffer
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, RpcError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

logger = logging.getLogger(__name__)

_BATCH_BYTES = 64 << 20
"""Bytes of blocks that are built before they are sent."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object to store: its key, its layout in words and its bytes."""

    key: BlockKey
    layout: str
    data: Buffer


class ObjectStore:
    """Objects of LMCache's by block key. Blocks until the client's deadlines; safe to use from any thread.

    Args:
        client: Connection to the store; owned by the caller.
    """

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._outage = False
        self._counters = dict.fromkeys(("refused_objects", "rejected_objects"), 0)

    @property
    def is_reachable(self) -> bool:
        """Whether the last call got an answer."""
        return not self._outage

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong: the client's counters, objects not taken, and objects found that do not fit."""
        with self._lock:
            return {**self._client.counters, **self._counters}

    def contains(self, keys: Sequence[BlockKey]) -> list[bool] | None:
        """Which of the keys are there; None while the store does not answer."""
        return self._attempt(lambda: self._client.contains(keys))

    def put(self, objects: Sequence[NewObject]) -> list[bool]:
        """Store objects; True where the store has the object afterwards.

        Their bytes are read before this returns, and never after.
        """
        stored: list[bool] = []
        batch: list[tuple[BlockKey, bytes]] = []
        batch_bytes = 0
        for number, new in enumerate(objects):
            block = self._pack(new)
            batch.append((new.key, block))
            batch_bytes += len(block)
            if batch_bytes >= _BATCH_BYTES or number == len(objects) - 1:
                stored += self._put(batch)
                batch, batch_bytes = [], 0
        return stored

    def get(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, StoredObject]]:
        """Position and object of the keys that are there, in order, each as soon as it has arrived."""
        try:
            for index, block in self._client.get(keys):
                found = None if block is None else self._unpack(keys[index], block)
                if found is not None:
                    yield index, found
            self._outage = False
        except RpcError as error:
            self._note_failure(error)

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove objects; True where one was there."""
        return self._attempt(lambda: self._client.delete(keys)) or [False] * len(keys)

    def ping(self) -> bool:
        """Whether the store answers."""
        return self._attempt(self._client.ping) is not None

    def reject(self, reason: str) -> None:
        """Count an object that its reader could not use."""
        self._count("rejected_objects")
        logger.warning("an object in the store is a miss: %s", reason)

    def _pack(self, new: NewObject) -> bytes:
        """A block, or no bytes for an object that makes none; the client calls that one invalid."""
        try:
            return pack_object(new.key, new.layout, new.data)
        except BlockFormatError as error:
            logger.warning("an object is not stored: %s", error)
            return b""

    def _unpack(self, key: BlockKey, block: bytes) -> StoredObject | None:
        try:
            return unpack_object(key, block)
        except BlockFormatError as error:
            self.reject(str(error))
            return None

    def _put(self, batch: list[tuple[BlockKey, bytes]]) -> list[bool]:
        outcomes = self._attempt(lambda: self._client.put(batch))
        if outcomes is None:
            return [False] * len(batch)
        stored = [outcome in (PutOutcome.STORED, PutOutcome.PRESENT) for outcome in outcomes]
        self._count("refused_objects", len(stored) - sum(stored))
        return stored

    def _attempt(self, call: Callable[[], _Answer]) -> _Answer | None:
        try:
            answer = call()
        except RpcError as error:
            self._note_failure(error)
            return None
        self._outage = False
        return answer

    def _note_failure(self, error: RpcError) -> None:
        if not self._outage:
            logger.warning("the store fails, everything is a miss until it works: %s", error)
        self._outage = True

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counters[name] += number
