"""How a batch of prefills is cut: sequences that one launch of attention serves."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, groupby, pairwise

from tq_connectors.engine.short_chunks import LONGEST_CHUNK


class Kind(Enum):
    """What serves a segment."""

    FRESH = "fresh"
    """Sequences without a prefix: attention among their new tokens alone."""
    SHORT = "short"
    """Sequences with a few new tokens after a prefix, decodes that are mixed in among them."""
    RESUMED = "resumed"
    """One sequence whose new tokens follow a compressed prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Neighbouring sequences of a batch.

    Args:
        kind: What serves them.
        rows: Their rows in the batch.
        tokens: Their new tokens in the batch.
        new_lens: New tokens of each.
        prefix_lens: Tokens of each that are in pages.
    """

    kind: Kind
    rows: slice
    tokens: slice
    new_lens: tuple[int, ...]
    prefix_lens: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each sequence starts and ends among the segment's tokens."""
        return list(pairwise([0, *accumulate(self.new_lens)]))


def cut_into_segments(prefix_lens: Sequence[int], new_lens: Sequence[int]) -> tuple[Segment, ...]:
    """Segments of a batch, in its order.

    Args:
        prefix_lens: Tokens of every sequence that are in pages.
        new_lens: New tokens of every sequence; one without any belongs to no segment.
    """
    starts = [0, *accumulate(new_lens)]
    rows = [row for row, new in enumerate(new_lens) if new]

    def together(place_and_row: tuple[int, int]) -> tuple[Kind, int]:
        place, row = place_and_row
        kind = _kind(prefix_lens[row], new_lens[row])
        return kind, row if kind is Kind.RESUMED else row - place

    segments = []
    for (kind, _), group in groupby(enumerate(rows), together):
        members = [row for _, row in group]
        first, end = members[0], members[-1] + 1
        segments.append(
            Segment(
                kind=kind,
                rows=slice(first, end),
                tokens=slice(starts[first], starts[end]),
                new_lens=tuple(new_lens[first:end]),
                prefix_lens=tuple(prefix_lens[first:end]),
            )
        )
    return tuple(segments)


def _kind(prefix: int, new: int) -> Kind:
    if not prefix:
        return Kind.FRESH
    return Kind.SHORT if new <= LONGEST_CHUNK else Kind.RESUMED
