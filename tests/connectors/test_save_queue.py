"""The queue never stalls whoever saves, and says what it lost."""

import logging
import threading

import pytest

from tq_connectors.save_queue import SaveQueue
from tq_store.errors import RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

KEYS = [BlockKey(bytes([i]) * 64) for i in range(64)]


class Store:
    """A store at the other end of the queue that can hold back, fail, or refuse."""

    def __init__(self, open_gate: bool = True) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.outcome = PutOutcome.STORED
        self.blocks: dict[BlockKey, bytes] = {}
        self.calls: list[int] = []
        if open_gate:
            self.gate.set()

    def put(self, blocks):
        self.entered.set()
        self.calls.append(len(blocks))
        assert self.gate.wait(30)
        if self.error:
            raise self.error
        self.blocks.update(blocks)
        return [self.outcome] * len(blocks)


@pytest.fixture
def store():
    return Store()


def test_all_offered_blocks_arrive(store):
    queue = SaveQueue(store, budget_bytes=1 << 20)
    assert all(queue.offer(key, key * 2) for key in KEYS)
    assert queue.flush(30)
    assert store.blocks == {key: key * 2 for key in KEYS}
    assert (queue.saved_blocks, queue.dropped_blocks, queue.failed_blocks) == (64, 0, 0)
    queue.close()


def test_one_call_takes_a_few_blocks_so_that_a_failure_costs_few():
    store = Store(open_gate=False)
    queue = SaveQueue(store, budget_bytes=1 << 20)
    for key in KEYS:
        queue.offer(key, b"x")
    store.gate.set()
    assert queue.flush(30)
    queue.close()
    assert max(store.calls) == 16


def test_a_process_that_forgot_to_close_can_end(store):
    queue = SaveQueue(store, budget_bytes=100)
    assert queue._thread.daemon
    queue.close()
    assert not queue._thread.is_alive()


def test_a_full_queue_drops_at_once_and_takes_again_when_there_is_room():
    store = Store(open_gate=False)
    queue = SaveQueue(store, budget_bytes=250)
    assert queue.offer(KEYS[0], bytes(100))
    assert store.entered.wait(30)
    assert queue.offer(KEYS[1], bytes(100))
    assert not queue.offer(KEYS[2], bytes(100))
    assert queue.offer(KEYS[3], bytes(50))
    store.gate.set()
    assert queue.flush(30)
    assert queue.offer(KEYS[4], bytes(250))
    queue.close()
    assert set(store.blocks) == {KEYS[0], KEYS[1], KEYS[3], KEYS[4]}
    assert queue.dropped_blocks == 1


def test_a_block_larger_than_the_budget_is_dropped(store):
    queue = SaveQueue(store, budget_bytes=10)
    assert not queue.offer(KEYS[0], bytes(11))
    assert queue.flush(30)
    queue.close()
    assert not store.blocks


def test_failures_are_counted_and_logged_once_an_outage(store, caplog):
    queue = SaveQueue(store, budget_bytes=1 << 20)
    with caplog.at_level(logging.WARNING):
        for outage in range(2):
            store.error = RpcUnavailable("nobody listens")
            for key in KEYS[:3]:
                queue.offer(key, b"x")
                assert queue.flush(30)
            store.error = None
            queue.offer(KEYS[3], b"x")
            assert queue.flush(30)
            assert len(caplog.records) == outage + 1
            assert not caplog.records[-1].exc_info
    queue.close()
    assert (queue.saved_blocks, queue.failed_blocks) == (2, 6)


@pytest.mark.parametrize(
    ("outcome", "saved"),
    [(PutOutcome.PRESENT, 1), (PutOutcome.STORED, 1), (PutOutcome.REFUSED, 0), (PutOutcome.INVALID, 0)],
)
def test_only_blocks_that_the_store_has_count_as_saved(store, outcome, saved):
    store.outcome = outcome
    queue = SaveQueue(store, budget_bytes=100)
    queue.offer(KEYS[0], b"x")
    queue.close()
    assert (queue.saved_blocks, queue.failed_blocks) == (saved, 1 - saved)


def test_a_client_that_fails_as_nobody_expected_costs_its_blocks_and_not_the_thread(store, caplog):
    queue = SaveQueue(store, budget_bytes=1 << 20)
    store.error = ZeroDivisionError("a mistake")
    with caplog.at_level(logging.WARNING):
        for key in KEYS[:2]:
            queue.offer(key, b"x")
            assert queue.flush(30)
    (record,) = caplog.records
    assert record.exc_info  # nobody expected it, so its traceback is needed
    store.error = None
    queue.offer(KEYS[2], b"x")
    queue.close()
    assert (queue.saved_blocks, queue.failed_blocks) == (1, 2)


def test_closing_puts_what_is_queued_and_refuses_more(store):
    queue = SaveQueue(store, budget_bytes=1 << 20)
    queue.offer(KEYS[0], b"x")
    queue.close()
    queue.close()
    assert store.blocks == {KEYS[0]: b"x"}
    assert not queue.offer(KEYS[1], b"x")


def test_closing_does_not_wait_longer_than_it_was_told():
    store = Store(open_gate=False)
    queue = SaveQueue(store, budget_bytes=1 << 20)
    for key in KEYS:
        queue.offer(key, b"x")
        store.entered.wait(30)
    assert not queue.flush(0.01)
    queue.close(timeout_s=0.01)
    assert queue.dropped_blocks > 0
    store.gate.set()
    assert queue.flush(30)
    assert queue.saved_blocks + queue.dropped_blocks == len(KEYS)
