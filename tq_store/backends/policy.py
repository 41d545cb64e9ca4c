"""Which block to drop next when a byte budget is full: eviction orders as pure data structures."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from tq_store.backends.usage import GROUP_BYTES
from tq_store.keys import BlockKey


class EvictionPolicy(Protocol):
    """The set of blocks that fit a byte budget, in the order in which they will go.

    Not thread-safe; no method blocks. The order of calls matters for prefixes: a block is useless without the
    blocks before it, so a caller that holds a prefix admits and touches it from its last block to its first.
    """

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are in; never more than the budget."""

    def __len__(self) -> int:
        """Blocks that are in."""

    def __contains__(self, key: BlockKey) -> bool:
        """Whether a block is in; does not count as use."""

    def touch(self, key: BlockKey) -> None:
        """Count a use; does nothing for a block that is not in."""

    def admit(self, key: BlockKey, size_bytes: int) -> list[BlockKey]:
        """Let a block in, and drop others to make room.

        Returns:
            The blocks dropped, never the one let in.

        Raises:
            ValueError: It is in already, or larger than the whole budget.
        """

    def remove(self, key: BlockKey) -> bool:
        """Forget a block; True where it was in."""


_MAX_USES = 3
"""The most passes over the main queue that a block can survive without another use."""


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    uses: int = 0


class _Queue:
    """Blocks in an order, and the bytes that they take.

    Which of them belong to which group is noted from the first time on that it is asked for: it takes memory,
    and is of use only where tenants have quotas.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        # not plain dicts: popping the front of those gets slower with every pop
        self._entries: OrderedDict[BlockKey, _Entry] = OrderedDict()
        self._groups: dict[bytes, OrderedDict[BlockKey, _Entry]] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def get(self, key: BlockKey) -> _Entry | None:
        return self._entries.get(key)

    def append(self, key: BlockKey, entry: _Entry) -> None:
        self._entries[key] = entry
        self.num_bytes += entry.size_bytes
        if self._groups is not None:
            self._groups.setdefault(key[:GROUP_BYTES], OrderedDict())[key] = entry

    def pop(self, key: BlockKey) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._forget(key, entry)
        return entry

    def pop_first(self) -> tuple[BlockKey, _Entry]:
        key, entry = self._entries.popitem(last=False)
        self._forget(key, entry)
        return key, entry

    def of_group(self, group: bytes) -> Iterator[tuple[BlockKey, _Entry]]:
        """Those whose keys begin with these `GROUP_BYTES`."""
        if self._groups is None:
            self._groups = {}
            for key, entry in self._entries.items():
                self._groups.setdefault(key[:GROUP_BYTES], OrderedDict())[key] = entry
        yield from self._groups.get(group, {}).items()

    def _forget(self, key: BlockKey, entry: _Entry) -> None:
        self.num_bytes -= entry.size_bytes
        if self._groups is not None:
            group = self._groups[key[:GROUP_BYTES]]
            del group[key]
            if not group:
                del self._groups[key[:GROUP_BYTES]]


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP 2023), weighted by bytes: three queues, constant amortised work per call.

    New blocks wait in a small queue; one that is not used there leaves without having pushed anything out of
    the main queue, which is what makes a scan harmless. The ghost queue remembers the keys that left that
    way, as many bytes' worth as the budget: whoever comes back while remembered goes to the main queue.

    Args:
        budget_bytes: What all blocks together may take.
        small_share: Part of the budget that the small queue keeps when the budget is full. The paper's 0.1
            loses to 0.3 on multi-turn chats, whose blocks rest between turns (`benchmarks/eviction.py`).
    """

    def __init__(self, budget_bytes: int, *, small_share: float = 0.3) -> None:
        self._budget_bytes = budget_bytes
        self._small_bytes_target = int(budget_bytes * small_share)
        self._small = _Queue()
        self._main = _Queue()
        self._ghost: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghost_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are in."""
        return self._small.num_bytes + self._main.num_bytes

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._small or key in self._main

    def touch(self, key: BlockKey) -> None:
        """Count a use."""
        entry = self._small.get(key) or self._main.get(key)
        if entry is not None:
            entry.uses = min(entry.uses + 1, _MAX_USES)

    def admit(self, key: BlockKey, size_bytes: int) -> list[BlockKey]:
        """Let a block in; see `EvictionPolicy.admit`."""
        _check_admissible(self, key, size_bytes, self._budget_bytes)
        evicted = []
        while self.used_bytes + size_bytes > self._budget_bytes:
            if self._small and (self._small.num_bytes >= self._small_bytes_target or not self._main):
                evicted += self._shrink_small()
            else:
                evicted += self._shrink_main()
        if key in self._ghost:
            self._ghost_bytes -= self._ghost.pop(key)
            self._main.append(key, _Entry(size_bytes))
        else:
            self._small.append(key, _Entry(size_bytes))
        return evicted

    def remove(self, key: BlockKey) -> bool:
        """Forget a block; a deleted block is not remembered as a ghost."""
        return (self._small.pop(key) or self._main.pop(key)) is not None

    def first_to_go(self, group: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a group, those without a use first, otherwise in their order.

        Stops when they come to both sizes. May look at all blocks of the group, and the first call at all
        there are, so it is for now and then.

        Args:
            group: The `GROUP_BYTES` with which keys of the group begin.
            num_bytes: So many bytes are to go.
            num_blocks: So many blocks are to go.
        """
        chosen: list[BlockKey] = []
        for is_used in (False, True):
            for key, entry in chain(self._small.of_group(group), self._main.of_group(group)):
                if num_bytes <= 0 and num_blocks <= 0:
                    return chosen
                if bool(entry.uses) == is_used:
                    chosen.append(key)
                    num_bytes -= entry.size_bytes
                    num_blocks -= 1
        return chosen

    def _shrink_small(self) -> list[BlockKey]:
        key, entry = self._small.pop_first()
        if entry.uses:
            entry.uses = 0
            self._main.append(key, entry)
            return []
        self._ghost[key] = entry.size_bytes
        self._ghost_bytes += entry.size_bytes
        while self._ghost_bytes > self._budget_bytes:
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]
        return [key]

    def _shrink_main(self) -> list[BlockKey]:
        key, entry = self._main.pop_first()
        if entry.uses:
            entry.uses -= 1
            self._main.append(key, entry)
            return []
        return [key]


class Lru:
    """Least recently used goes first: what `benchmarks/eviction.py` measures S3-FIFO against."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._sizes: OrderedDict[BlockKey, int] = OrderedDict()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are in."""
        return self._used_bytes

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._sizes

    def touch(self, key: BlockKey) -> None:
        """Move a block to the far end of the order."""
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def admit(self, key: BlockKey, size_bytes: int) -> list[BlockKey]:
        """Let a block in; see `EvictionPolicy.admit`."""
        _check_admissible(self, key, size_bytes, self._budget_bytes)
        evicted = []
        while self._used_bytes + size_bytes > self._budget_bytes:
            victim, victim_bytes = self._sizes.popitem(last=False)
            self._used_bytes -= victim_bytes
            evicted.append(victim)
        self._sizes[key] = size_bytes
        self._used_bytes += size_bytes
        return evicted

    def remove(self, key: BlockKey) -> bool:
        """Forget a block; True where it was in."""
        size_bytes = self._sizes.pop(key, None)
        self._used_bytes -= size_bytes or 0
        return size_bytes is not None


def _check_admissible(policy: EvictionPolicy, key: BlockKey, size_bytes: int, budget_bytes: int) -> None:
    if key in policy:
        raise ValueError(f"block {key.hex()[64:80]} is in already")
    if not 0 <= size_bytes <= budget_bytes:
        raise ValueError(f"a block of {size_bytes} bytes cannot enter a budget of {budget_bytes}")
