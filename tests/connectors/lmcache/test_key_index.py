"""Locks, sizes and deletions, against a model of what LMCache asks for."""

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tq_connectors.lmcache.key_index import KeyIndex


@pytest.fixture
def index() -> KeyIndex[str]:
    return KeyIndex()


def test_an_object_is_counted_once(index):
    assert (index.add("a", 5), index.add("a", 5)) == (True, False)
    assert index.known() == [("a", 5)]
    assert index.forget(["a", "b"]) == [("a", 5)]
    assert index.num_objects == 0


def test_a_locked_object_is_deleted_with_its_last_unlock(index):
    index.add("a", 5)
    index.lock(["a", "a"])
    assert index.begin_deletion(["a"]) == ([], [])
    assert (index.unlock(["a"]), index.unlock(["a"])) == ([], ["a"])
    assert index.begin_deletion(["a"]) == (["a"], [("a", 5)])
    assert index.num_locked == 0


def test_one_unlock_too_many_does_nothing(index):
    assert index.unlock(["a"]) == []
    index.lock(["a"])
    assert index.num_locked == 1


def test_an_object_is_gone_while_it_is_deleted(index):
    index.begin_deletion(["a", "a"])
    assert index.is_leaving("a")
    assert not index.wait_for_deletions(["b", "a"], timeout_s=0.01)
    waiter = threading.Thread(target=index.wait_for_deletions, args=(["a"], 10.0))
    waiter.start()
    index.end_deletion(["a"])
    waiter.join(10.0)
    assert not waiter.is_alive()
    assert not index.is_leaving("a")


class Locks(RuleBasedStateMachine):
    """Whatever comes in whatever order, what is held is not deleted, and what is due is deleted once."""

    def __init__(self) -> None:
        super().__init__()
        self.index: KeyIndex[int] = KeyIndex()
        self.held: dict[int, int] = {}
        self.doomed: set[int] = set()

    @rule(key=st.integers(0, 3))
    def lock(self, key):
        self.index.lock([key])
        self.held[key] = self.held.get(key, 0) + 1

    @rule(key=st.integers(0, 3))
    def unlock(self, key):
        due = self.index.unlock([key])
        self.held[key] = max(0, self.held.get(key, 0) - 1)
        is_due = not self.held[key] and key in self.doomed
        assert due == ([key] if is_due else [])
        if not self.held[key]:
            self.doomed.discard(key)

    @rule(key=st.integers(0, 3))
    def delete(self, key):
        leaving, _ = self.index.begin_deletion([key])
        if self.held.get(key):
            assert leaving == []
            self.doomed.add(key)
        else:
            assert leaving == [key]
            self.index.end_deletion([key])

    @invariant()
    def only_held_keys_are_locked(self):
        assert self.index.num_locked == sum(1 for count in self.held.values() if count)


TestLocks = Locks.TestCase
TestLocks.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
