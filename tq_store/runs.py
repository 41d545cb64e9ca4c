"""Things in order, as many at a time as are within limits."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def runs_of(
    items: Sequence[_Item],
    num_bytes_of: Callable[[_Item], int],
    *,
    most_bytes: int,
    most_items: int | None = None,
) -> Iterator[Sequence[_Item]]:
    """Runs of items that are within both limits, as long as can be; of at least one item."""
    start, num_bytes = 0, 0
    for end, item in enumerate(items):
        is_full = end - start == most_items or num_bytes + num_bytes_of(item) > most_bytes
        if end > start and is_full:
            yield items[start:end]
            start, num_bytes = end, 0
        num_bytes += num_bytes_of(item)
    if start < len(items):
        yield items[start:]
