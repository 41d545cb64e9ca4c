"""Numbered tasks on threads: submitted without waiting, announced when done, their results fetched once."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class TaskQueue(Generic[Result]):
    """Tasks of one kind, first in, first out. Nothing here blocks, but for `drain` and `close`.

    Args:
        name: Of the threads.
        num_threads: Tasks that run at once.
        max_pending: Tasks that may wait or run; one more fails at once.
        announce: Called from any thread when a result is there.
    """

    def __init__(
        self, name: str, *, num_threads: int, max_pending: int, announce: Callable[[], None]
    ) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=f"tq-{name}")
        self._max_pending = max_pending
        self._announce = announce
        self._changed = threading.Condition()
        self._next_id = 0
        self._pending = 0
        self._results: dict[int, Result] = {}
        self.refused_tasks = 0

    @property
    def pending_tasks(self) -> int:
        """Tasks that wait or run."""
        return self._pending

    def submit(self, work: Callable[[], Result], failed: Result) -> int:
        """Number of a new task.

        Args:
            work: Runs on a thread of the queue.
            failed: The result if the queue is full or closed, or if `work` raises.
        """
        with self._changed:
            task_id = self._next_id
            self._next_id += 1
            is_taken = self._pending < self._max_pending
            self._pending += is_taken
            self.refused_tasks += not is_taken
        if is_taken:
            try:
                self._pool.submit(self._run, task_id, work, failed)
            except RuntimeError:  # closed
                self._finish(task_id, failed, was_pending=True)
        else:
            self._finish(task_id, failed, was_pending=False)
        return task_id

    def take(self, task_id: int) -> Result | None:
        """The result of a task, once; None while there is none and ever after."""
        with self._changed:
            return self._results.pop(task_id, None)

    def take_all(self) -> dict[int, Result]:
        """All results that nobody took yet."""
        with self._changed:
            results, self._results = self._results, {}
        return results

    def drain(self) -> None:
        """Wait until nothing waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self) -> None:
        """Drop what waits and wait for what runs. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, task_id: int, work: Callable[[], Result], failed: Result) -> None:
        try:
            result = work()
        except Exception:  # whatever it is, the engine must get an answer
            logger.exception("a task of the store adapter failed")
            result = failed
        self._finish(task_id, result, was_pending=True)

    def _finish(self, task_id: int, result: Result, *, was_pending: bool) -> None:
        with self._changed:
            self._results[task_id] = result
            self._pending -= was_pending
            self._changed.notify_all()
        self._announce()
