"""The linker's threads: tasks in order, and an end whatever they raise."""

import threading

import pytest
import torch

from tq_connectors.sglang.worker import Worker


@pytest.mark.timeout(30)
def test_a_task_that_raises_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    worker = Worker("test", torch.device("cpu"))

    def fail() -> None:
        raise ValueError("an error of a task")

    for task in (lambda: done.append(1), fail, lambda: done.append(2)):
        worker.put(task)
    worker.join()
    assert done == [1, 2]
    assert "an error of a task" in caplog.text
    worker.put(lambda: done.append(3))
    worker.close()
    worker.join()
    assert done == [1, 2, 3]
    assert "test" not in {thread.name for thread in threading.enumerate()}
