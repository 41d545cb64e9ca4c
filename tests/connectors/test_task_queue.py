"""Tasks: not waited for, announced once, their results taken once, whatever happens to them."""

import threading

import pytest

from tq_connectors.task_queue import TaskQueue

WAIT_S = 10.0


class Announcements:
    def __init__(self) -> None:
        self._semaphore = threading.Semaphore(0)

    def __call__(self) -> None:
        self._semaphore.release()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._semaphore.acquire(timeout=WAIT_S)


@pytest.fixture
def announced() -> Announcements:
    return Announcements()


def queue_of(announced, *, num_threads: int = 1, max_pending: int = 10) -> TaskQueue[str]:
    return TaskQueue("test", num_threads=num_threads, max_pending=max_pending, announce=announced)


def test_a_result_is_announced_and_taken_once(announced):
    queue = queue_of(announced)
    task = queue.submit(lambda: "done", "failed")
    announced.wait()
    assert (queue.take(task), queue.take(task), queue.take(99)) == ("done", None, None)
    queue.close()


def test_all_results_are_taken_once(announced):
    queue = queue_of(announced)
    tasks = [queue.submit(str, "failed") for _ in range(3)]
    announced.wait(3)
    assert queue.take_all() == dict.fromkeys(tasks, "")
    assert queue.take_all() == {}
    queue.close()


def test_submitting_does_not_wait_and_a_full_queue_fails_at_once(announced):
    queue, gate = queue_of(announced, max_pending=2), threading.Event()
    held = [queue.submit(lambda: str(gate.wait(WAIT_S)), "failed") for _ in range(2)]
    assert queue.pending_tasks == 2
    refused = queue.submit(lambda: "done", "failed")
    announced.wait()
    assert (queue.take(refused), queue.refused_tasks) == ("failed", 1)
    gate.set()
    announced.wait(2)
    assert [queue.take(task) for task in held] == ["True", "True"]
    assert queue.pending_tasks == 0
    queue.close()


def test_a_task_that_raises_has_failed_and_the_next_one_runs(announced, caplog):
    queue = queue_of(announced)

    def fail() -> str:
        raise RuntimeError("a bug")

    first, second = queue.submit(fail, "failed"), queue.submit(lambda: "done", "failed")
    announced.wait(2)
    assert (queue.take(first), queue.take(second)) == ("failed", "done")
    assert "a bug" in caplog.text
    queue.close()


def test_closing_waits_for_what_runs_and_fails_what_comes_later(announced):
    queue, started, gate = queue_of(announced), threading.Event(), threading.Event()

    def hold() -> str:
        started.set()
        gate.wait(WAIT_S)
        return "done"

    task = queue.submit(hold, "failed")
    assert started.wait(WAIT_S)
    closer = threading.Thread(target=queue.close)
    closer.start()
    gate.set()
    closer.join(WAIT_S)
    assert queue.take(task) == "done"
    late = queue.submit(lambda: "done", "failed")
    assert queue.take(late) == "failed"
    queue.close()
