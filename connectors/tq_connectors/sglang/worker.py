"""Worker: a thread that does one thing after the other, and outlives whatever fails in one."""

import logging
import queue
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


class Worker:
    """Tasks in order, on a stream of the thread's own where there are streams.

    Args:
        name: Of the thread.
        device: Whose stream.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], None]) -> None:
        """Do something soon; what it raises is logged."""
        self._tasks.put(task)

    def join(self) -> None:
        """Wait until all is done."""
        self._tasks.join()

    def close(self) -> None:
        """Do what is left, and end."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        # a thread begins on the first device; entering a stream moves it to that of the stream
        with torch.cuda.stream(self._stream):
            while (task := self._tasks.get()) is not None:
                try:
                    task()
                except Exception:
                    logger.exception("a task of the linker failed")
                finally:
                    self._tasks.task_done()
        self._tasks.task_done()
