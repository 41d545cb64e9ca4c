"""What a storage medium must do: hold bytes under keys, in batches, positionally."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tq_store.backends.usage import UsageCounter
from tq_store.keys import BlockKey
from tq_store.results import BackendStats, PutOutcome, ShardStats


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


@runtime_checkable
class Counted(Backend, Protocol):
    """A backend that knows at every moment what each namespace takes up in it."""

    @property
    def usage(self) -> UsageCounter:
        """Its count; for reading."""

    async def first_to_go(self, group: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a group of namespaces that come to both sizes, the least worth keeping first."""


@runtime_checkable
class Sharded(Protocol):
    """A backend made of servers that fail one by one."""

    def shards(self) -> list[ShardStats]:
        """How each server has behaved; known without asking any."""
