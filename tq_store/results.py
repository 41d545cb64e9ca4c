"""What storing answers: what became of a put, and what a medium holds."""

from dataclasses import dataclass
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
