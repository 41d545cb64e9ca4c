"""in_runs: a sequence cut into runs, one for each thread."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def in_runs(
    threads: ThreadPoolExecutor,
    most_runs: int,
    work: Callable[[int, Sequence[_Item]], list[_Answer]],
    items: Sequence[_Item],
) -> list[_Answer]:
    """What `work` says of all items, in order. No run is under way after this, whether it returns or raises.

    Args:
        threads: Where runs are worked on.
        most_runs: As many runs of about the same length, or fewer.
        work: Gets the position of a run's first item, and the run; gives an answer to each item.
        items: In order.
    """
    length = max(1, -(-len(items) // most_runs))
    starts = range(0, len(items), length)
    runs: list[Future[list[_Answer]]] = []
    try:
        runs.extend(threads.submit(work, start, items[start : start + length]) for start in starts)
    finally:
        wait(runs)
    return [answer for run in runs for answer in run.result()]
