"""What a storage medium must do: hold bytes under keys, in batches, positionally."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from tq_store.keys import BlockKey


class PutOutcome(Enum):
    """What became of one block that was offered."""

    STORED = 1
    """It is there now, by this call."""
    PRESENT = 2
    """It was there already; content addressing makes the two interchangeable."""
    REFUSED = 3
    """No room, or the block is larger than the whole budget. A future miss, not an error."""
    INVALID = 4
    """The bytes are not a sound block of that key. Said by the store that verifies, never by a medium."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """What a medium holds at this moment.

    Args:
        num_blocks: Blocks that a get would find.
        used_bytes: Bytes of those blocks, headers included.
        budget_bytes: The limit it keeps, or None where the medium keeps its own.
        evicted_blocks: Blocks dropped to make room since it was opened.
    """

    num_blocks: int
    used_bytes: int
    budget_bytes: int | None
    evicted_blocks: int


@runtime_checkable
class Backend(Protocol):
    """One storage medium. Tiers are built from these.

    Called from the server's event loop by many tasks at once; no method blocks the loop. Results are
    positional: one per key, in the order asked. Backends do not look into blocks: whoever calls has verified
    what it puts and verifies what it gets. A returned buffer stays valid whatever happens to the block later.

    Raises:
        BackendError: The medium failed. Foreign exceptions never pass.
    """

    @property
    def name(self) -> str:
        """Short name for metrics and logs: ``memory``, ``disk``, ``redis``."""

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there; does not count as use."""

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """The blocks, or None for a miss. Counts as use for eviction."""

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Store blocks; each becomes visible whole or not at all. May evict others."""

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove blocks; True where one was there."""

    async def quarantine(self, key: BlockKey) -> None:
        """Take a corrupt block out of service; keep its bytes for inspection where the medium can."""

    async def purge(self, namespace: bytes | None = None) -> int:
        """Remove all blocks of a namespace digest, or all of this store's; returns how many."""

    async def stats(self) -> BackendStats:
        """What the medium holds now."""

    async def close(self) -> None:
        """Release everything; later calls raise BackendUnavailable, a second close does nothing."""
