"""What storing answers: what became of a put, and what a medium holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


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


class GetOutcome(Enum):
    """What became of one block that was to be written to places of the caller's."""

    FILLED = 1
    """The places hold its payload, which was verified."""
    MISSING = 2
    """It is not there, or not sound; the places may hold anything, as with the next one."""
    UNLIKE = 3
    """A sound block of that key that holds something else than was said."""


MAX_NAMESPACES = 256
"""Namespaces of a medium that statistics name; the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceUsage:
    """What one namespace takes up in a medium.

    Args:
        num_blocks: Its blocks.
        used_bytes: Bytes of those blocks, headers included.
    """

    num_blocks: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """How one server of a medium that has several, or one, has behaved since the medium was opened.

    Args:
        name: Where it is.
        is_open: Whether its circuit breaker is open: it failed too often and is left alone.
        failed_calls: Calls that it did not answer, or refused to.
        lost_keys: Keys that were misses, and blocks that were refused, because it failed or was left alone.
    """

    name: str
    is_open: bool
    failed_calls: int
    lost_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """What a medium holds at this moment.

    Args:
        num_blocks: Blocks that a get would find.
        used_bytes: Bytes of those blocks, headers included.
        budget_bytes: The limit it keeps, or None where the medium keeps its own.
        evicted_blocks: Blocks dropped to make room since it was opened.
        namespaces: What each namespace takes up, or at least each of the largest, by its digest in hex, where
            the medium keeps count; a count may be some minutes old.
    """

    num_blocks: int
    used_bytes: int
    budget_bytes: int | None
    evicted_blocks: int
    namespaces: Mapping[str, NamespaceUsage] = field(default_factory=dict)


def largest_namespaces(stats: BackendStats, count: int) -> list[tuple[str, NamespaceUsage]]:
    """The namespaces that take up most, the largest first."""
    by_size = sorted(stats.namespaces.items(), key=lambda item: item[1].used_bytes, reverse=True)
    return by_size[:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """What waits to be written to a tier at this moment.

    Args:
        num_blocks: Blocks that wait.
        used_bytes: Bytes of those and of the blocks being written.
        limit_bytes: Beyond it blocks are dropped.
    """

    num_blocks: int
    used_bytes: int
    limit_bytes: int
