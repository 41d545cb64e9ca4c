"""Which namespaces are used, and how much: counts for the busiest, within bounded memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tq_store.keys import DIGEST_BYTES, BlockKey

_MAX_NAMESPACES = 1024


@dataclass(slots=True, kw_only=True)
class NamespaceCounts:
    """What was asked of one namespace since it was first seen.

    Args:
        asked_keys: Keys of lookups.
        found_keys: Those of them that were leading hits.
        sent_bytes: Blocks sent in gets.
        received_bytes: Blocks received in puts.
    """

    asked_keys: int = 0
    found_keys: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class Activity:
    """Counts by namespace. When there are more than it keeps, the one unused for longest is forgotten.

    Written on the event loop, read from other threads.
    """

    def __init__(self, *, max_namespaces: int = _MAX_NAMESPACES) -> None:
        self._max_namespaces = max_namespaces
        self._counts: OrderedDict[bytes, NamespaceCounts] = OrderedDict()

    def looked_up(self, keys: Sequence[BlockKey], num_hits: int) -> None:
        """A lookup asked for these keys and found the first `num_hits`.

        The keys of a lookup are those of one prompt, so all count for the namespace of the first.
        """
        if keys:
            counts = self._of(keys[0][:DIGEST_BYTES])
            counts.asked_keys += len(keys)
            counts.found_keys += num_hits

    def sent(self, namespace: bytes, num_bytes: int) -> None:
        """A block was sent."""
        self._of(namespace).sent_bytes += num_bytes

    def received(self, namespace: bytes, num_bytes: int) -> None:
        """A block arrived."""
        self._of(namespace).received_bytes += num_bytes

    def busiest(self, num_namespaces: int) -> list[tuple[bytes, NamespaceCounts]]:
        """Digests and counts of the namespaces that moved the most bytes, then asked for the most keys."""
        ranked = sorted(self._counts.copy().items(), key=lambda item: _rank(item[1]), reverse=True)
        return ranked[:num_namespaces]

    def _of(self, digest: bytes) -> NamespaceCounts:
        counts = self._counts.get(digest)
        if counts is None:
            if len(self._counts) >= self._max_namespaces:
                self._counts.popitem(last=False)
            counts = self._counts[digest] = NamespaceCounts()
        self._counts.move_to_end(digest)
        return counts


def _rank(counts: NamespaceCounts) -> tuple[int, int]:
    return counts.sent_bytes + counts.received_bytes, counts.asked_keys
