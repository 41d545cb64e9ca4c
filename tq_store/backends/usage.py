"""What each namespace takes up in a medium, counted as blocks come and go."""

import heapq
from collections import defaultdict
from dataclasses import dataclass

from tq_store.keys import BlockKey, split_key
from tq_store.results import NamespaceUsage

GROUP_BYTES = 8
"""Namespaces whose digests begin with the same bytes are counted together as well, as one group."""


@dataclass(slots=True)
class _Count:
    num_blocks: int = 0
    used_bytes: int = 0


class UsageCounter:
    """Counts by namespace and by group; constant work a block, memory for namespaces that hold something.

    Changed by one thread at a time; read from any.
    """

    def __init__(self) -> None:
        self._namespaces: defaultdict[bytes, _Count] = defaultdict(_Count)
        self._groups: defaultdict[bytes, _Count] = defaultdict(_Count)

    def add(self, key: BlockKey, size_bytes: int) -> None:
        """A block came."""
        for counts, name in self._places(key):
            count = counts[name]
            count.num_blocks += 1
            count.used_bytes += size_bytes

    def remove(self, key: BlockKey, size_bytes: int) -> None:
        """A block went."""
        for counts, name in self._places(key):
            count = counts[name]
            count.num_blocks -= 1
            count.used_bytes -= size_bytes
            if not count.num_blocks:
                del counts[name]

    def of_group(self, group: bytes) -> NamespaceUsage:
        """What all namespaces hold whose digests begin with these 8 bytes."""
        count = self._groups.get(group, _Count())
        return NamespaceUsage(num_blocks=count.num_blocks, used_bytes=count.used_bytes)

    def largest(self, count: int) -> dict[str, NamespaceUsage]:
        """The namespaces that take up most, by their digests in hex."""
        items = list(self._namespaces.items())
        return {
            namespace.hex(): NamespaceUsage(num_blocks=held.num_blocks, used_bytes=held.used_bytes)
            for namespace, held in heapq.nlargest(count, items, key=lambda item: item[1].used_bytes)
        }

    def clear(self) -> None:
        """Everything went."""
        self._namespaces.clear()
        self._groups.clear()

    def _places(self, key: BlockKey) -> tuple[tuple[defaultdict[bytes, _Count], bytes], ...]:
        namespace, _ = split_key(key)
        return (self._namespaces, namespace), (self._groups, namespace[:GROUP_BYTES])
