"""Blocks in the memory of this process, up to a byte budget."""

from collections.abc import Sequence

from tq_store.backends.policy import S3Fifo
from tq_store.backends.usage import UsageCounter
from tq_store.errors import BackendUnavailable, ConfigError
from tq_store.keys import BlockKey, split_key
from tq_store.results import MAX_NAMESPACES, BackendStats, PutOutcome


class MemoryBackend:
    """Keeps the very buffers it is given and hands them out again: nothing is copied.

    Bound to one event loop; no method awaits anything, so every call is atomic. What is quarantined is
    dropped: bytes that went bad in memory say nothing worth keeping.

    Args:
        budget_bytes: Bytes of blocks to hold; Python's own overhead, about 750 bytes a block, comes on top;
            where tenants have quotas, 100 more.
        name: Short name for metrics and logs.
    """

    def __init__(self, *, budget_bytes: int, name: str = "memory") -> None:
        if budget_bytes < 1:
            raise ConfigError(f"budget_bytes of the {name} tier must be at least 1, not {budget_bytes}")
        self._name = name
        self._budget_bytes = budget_bytes
        self.usage = UsageCounter()
        self._policy = S3Fifo(budget_bytes)
        self._blocks: dict[BlockKey, bytes] = {}
        self._evicted_blocks = 0
        self._closed = False

    @property
    def name(self) -> str:
        """Short name for metrics and logs."""
        return self._name

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there."""
        self._check_open()
        return [key in self._blocks for key in keys]

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """The buffers that were put, or None."""
        self._check_open()
        for key in reversed(keys):
            self._policy.touch(key)
        return [self._blocks.get(key) for key in keys]

    def sizes_bytes(self, keys: Sequence[BlockKey]) -> list[int]:
        """Lengths of the leading blocks, up to the first that is not there; does not count as use."""
        sizes_bytes = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            sizes_bytes.append(len(block))
        return sizes_bytes

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Keep blocks, and evict others where the budget asks for it."""
        self._check_open()
        # last to first, so that of a prefix that is too long the beginning stays
        return [self._put_one(key, block) for key, block in reversed(blocks)][::-1]

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Drop blocks."""
        self._check_open()
        return [self._drop(key) for key in keys]

    async def quarantine(self, key: BlockKey) -> None:
        """Drop a block."""
        await self.delete([key])

    async def purge(self, namespace: bytes | None = None) -> int:
        """Drop all blocks of a namespace digest, or all."""
        self._check_open()
        doomed = [key for key in self._blocks if namespace in (None, split_key(key)[0])]
        return sum(self._drop(key) for key in doomed)

    async def stats(self) -> BackendStats:
        """What is held now."""
        self._check_open()
        return BackendStats(
            num_blocks=len(self._blocks),
            used_bytes=self._policy.used_bytes,
            budget_bytes=self._budget_bytes,
            evicted_blocks=self._evicted_blocks,
            namespaces=self.usage.largest(MAX_NAMESPACES),
        )

    async def first_to_go(self, group: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a group, the least worth keeping first."""
        return self._policy.first_to_go(group, num_bytes=num_bytes, num_blocks=num_blocks)

    async def close(self) -> None:
        """Let go of all blocks."""
        self._closed = True
        self._blocks.clear()
        self.usage.clear()

    def _put_one(self, key: BlockKey, block: bytes) -> PutOutcome:
        if key in self._blocks:
            self._policy.touch(key)
            return PutOutcome.PRESENT
        if len(block) > self._budget_bytes:
            return PutOutcome.REFUSED
        for victim in self._policy.admit(key, len(block)):
            self.usage.remove(victim, len(self._blocks.pop(victim)))
            self._evicted_blocks += 1
        self._blocks[key] = block
        self.usage.add(key, len(block))
        return PutOutcome.STORED

    def _drop(self, key: BlockKey) -> bool:
        self._policy.remove(key)
        block = self._blocks.pop(key, None)
        if block is not None:
            self.usage.remove(key, len(block))
        return block is not None

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable(f"the {self._name} tier is closed")
