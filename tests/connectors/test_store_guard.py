"""A store that fails costs a few waits, is left alone for a while, and is found again when it works."""

import logging

import pytest

from tq_connectors.store_guard import StoreGuard
from tq_store.errors import RpcTimeout


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Store:
    """Answers, or not; counts who asked."""

    def __init__(self) -> None:
        self.works = True
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if not self.works:
            raise RpcTimeout("too late")
        return "answer"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_pauses_double_up_to_thirty_seconds(clock):
    guard, store = StoreGuard(clock), Store()
    store.works = False
    for pause_s in (1, 2, 4, 8, 16, 30, 30):
        assert guard.attempt(store) is None
        assert not guard.is_reachable
        calls = store.calls
        clock.now_s += pause_s - 0.01
        assert guard.attempt(store) is None
        assert store.calls == calls
        clock.now_s += 0.02
    assert guard.skipped_calls == 7


def test_the_first_answer_ends_an_outage(clock, caplog):
    guard, store = StoreGuard(clock), Store()
    caplog.set_level(logging.INFO)
    store.works = False
    for _ in range(3):
        guard.attempt(store)
        clock.now_s += 60
    store.works = True
    assert guard.attempt(store) == "answer"
    assert guard.is_reachable
    assert guard.attempt(store) == "answer"
    assert [record.getMessage() for record in caplog.records] == [
        "the store fails, everything is a miss until it works: too late",
        "the store answers again",
    ]


def test_after_a_pause_one_call_is_made_and_the_others_are_misses(clock):
    guard, store = StoreGuard(clock), Store()
    store.works = False
    guard.attempt(store)
    clock.now_s += 1.5
    answers = []

    def slow() -> str:
        answers.append(guard.attempt(store))  # another thread's call, while this one is under way
        return "answer"

    assert guard.attempt(slow) == "answer"
    assert answers == [None]


def test_what_is_no_failure_of_the_store_passes_through(clock):
    guard = StoreGuard(clock)
    with pytest.raises(ZeroDivisionError):
        guard.attempt(lambda: 1 / 0)
    assert guard.is_reachable


def test_calls_that_fail_together_are_one_failure(clock):
    guard, store = StoreGuard(clock), Store()
    store.works = False

    def while_another_fails():
        clock.now_s += 0.1
        assert guard.attempt(store) is None
        clock.now_s += 0.1
        return store()

    assert guard.attempt(while_another_fails) is None
    clock.now_s += 0.91
    store.works = True
    assert guard.attempt(store) == "answer"
