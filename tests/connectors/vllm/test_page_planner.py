"""Which pages are loaded and saved, when the engine does what engines do."""

import threading
from concurrent.futures import wait
from dataclasses import dataclass, field

import pytest

from tq_connectors.vllm.page_planner import PagePlanner, Progress
from tq_store.keys import BlockKey

PAGE, BLOCK = 64, 16


@dataclass
class FakeRequest:
    request_id: str = "one"
    num_prompt_tokens: int = 300
    num_tokens: int = 300
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.block_hashes = [bytes([number]) for number in range(self.num_tokens // BLOCK)]

    def grow(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.__post_init__()


class Store:
    """Has so many leading pages, and says so when it may."""

    def __init__(self) -> None:
        self.has, self.asked, self.may_answer = 4, 0, threading.Event()
        self.may_answer.set()

    def lookup(self, keys) -> int:
        self.asked += 1
        assert self.may_answer.wait(10)
        return min(self.has, len(keys))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def planner(store, clock):
    made = PagePlanner(
        store.lookup,
        lambda block_hash: BlockKey(block_hash),
        page_tokens=PAGE,
        block_tokens=BLOCK,
        hash_tokens=BLOCK,
        shares_blocks=True,
        lookup_timeout_s=1.0,
        clock=clock,
    )
    yield made
    made.close()


def matched(planner, request, num_computed: int = 0) -> int:
    """What is said once the store has answered."""
    found = planner.matched(request, num_computed)
    while found is None and not planner._requests[request.request_id].found.done():
        wait([planner._requests[request.request_id].found], 10)
    return planner.matched(request, num_computed)


def blocks_of(first: int, count: int = 19) -> list[int]:
    return list(range(first, first + count))


def step(planner, request, scheduled: int, computed: int = 0, blocks=(), resumed: bool = False):
    return planner.step([Progress(request, blocks, resumed, computed, scheduled)], overwrites=False)


def test_a_lookup_is_not_waited_for_and_asked_once(planner, store):
    store.may_answer.clear()
    request = FakeRequest()
    assert planner.matched(request, 0) is None
    assert planner.matched(request, 0) is None
    store.may_answer.set()
    assert matched(planner, request) == 4 * PAGE
    assert store.asked == 1


def test_a_lookup_that_comes_late_has_found_nothing(planner, store, clock):
    store.may_answer.clear()
    asked = [
        FakeRequest(str(number)) for number in range(6)
    ]  # more than ask at once: some wait for their turn
    assert [planner.matched(request, 0) for request in asked] == [None] * 6
    clock.now_s = 0.9
    assert planner.matched(asked[0], 0) is None
    clock.now_s = 1.0
    assert [planner.matched(request, 0) for request in asked] == [0] * 6
    assert planner.matched(asked[5], 0) == 0
    store.may_answer.set()


def test_a_lookup_that_breaks_has_found_nothing(planner, store, caplog):
    store.has = "many"
    assert matched(planner, FakeRequest()) == 0
    assert "a lookup failed" in caplog.text


def test_after_the_end_nothing_is_found(planner):
    planner.close()
    assert planner.matched(FakeRequest(), 0) == 0


def test_what_is_found_is_loaded_into_the_blocks_it_belongs_to(planner):
    request = FakeRequest()
    assert matched(planner, request, 32) == 4 * PAGE - 32
    planner.allocated(request, blocks_of(100), 4 * PAGE - 32)
    moves = step(planner, request, 0)
    ((load,), (), []) = moves.loads, tuple(moves.saves), moves.held
    assert load.request_id == "one"
    assert [page.key for page in load.pages] == [bytes([3]), bytes([7]), bytes([11]), bytes([15])]
    assert load.pages[0].blocks == (-1, -1, 102, 103)
    assert load.pages[3].blocks == (112, 113, 114, 115)
    assert not step(planner, request, 0).loads


def test_one_token_is_always_left_to_compute(planner, store):
    store.has = 99
    assert matched(planner, FakeRequest(num_tokens=256, num_prompt_tokens=256)) == 3 * PAGE
    assert matched(planner, FakeRequest("two", num_tokens=257, num_prompt_tokens=257)) == 4 * PAGE
    assert planner.matched(FakeRequest("three", num_tokens=63, num_prompt_tokens=63), 0) == 0


def test_a_request_waits_for_pages_that_another_is_loading(planner):
    first, second = FakeRequest(), FakeRequest("two")
    assert matched(planner, first) == 4 * PAGE
    assert matched(planner, second) == 4 * PAGE
    planner.allocated(first, blocks_of(0), 4 * PAGE)
    assert planner.matched(second, 0) is None
    assert planner.matched(second, 4 * PAGE) == 0
    planner.moved(["one"], [], set())
    assert planner.matched(second, 0) == 4 * PAGE


def test_after_a_failed_load_a_request_loads_no_more_and_is_saved_anew(planner):
    request = FakeRequest()
    matched(planner, request)
    planner.allocated(request, blocks_of(0), 4 * PAGE)
    planner.moved(["one", "unknown"], [], {7})
    assert planner.matched(request, 0) == 0
    moves = step(planner, request, 300, blocks=blocks_of(0))
    assert [len(save.pages) for save in moves.saves] == [4]


def test_a_rank_may_fail_before_the_others_have_ended(planner):
    request = FakeRequest()
    matched(planner, request)
    planner.allocated(request, blocks_of(0), 4 * PAGE)
    planner.moved([], [], {7})
    planner.moved(["one"], [], set())
    assert planner.matched(request, 0) == 0
    moves = step(planner, request, 300, blocks=blocks_of(0))
    assert [len(save.pages) for save in moves.saves] == [4]


def test_a_failure_elsewhere_refuses_nothing(planner):
    request = FakeRequest()
    matched(planner, request)
    planner.allocated(request, blocks_of(0), 4 * PAGE)
    planner.moved(["one"], [], {700})
    assert planner.matched(request, 0) == 4 * PAGE


def test_pages_of_a_prompt_are_saved_with_the_step_that_computes_them(planner):
    request = FakeRequest()
    first = step(planner, request, 128, blocks=blocks_of(50))
    assert [page.blocks for page in first.saves[0].pages] == [(50, 51, 52, 53), (54, 55, 56, 57)]
    second = step(planner, request, 172, computed=128)
    assert [page.blocks[0] for page in second.saves[0].pages] == [58, 62]


def test_pages_of_an_answer_are_saved_when_their_tokens_stay(planner):
    request = FakeRequest(num_tokens=319)
    assert len(step(planner, request, 300, blocks=blocks_of(0, 30)).saves[0].pages) == 4
    assert not step(planner, request, 1, computed=319).saves
    request.grow(321)
    assert [page.key for page in step(planner, request, 1, computed=320).saves[0].pages] == [bytes([19])]


def test_a_prefix_on_the_device_is_not_saved_again(planner):
    request = FakeRequest()
    moves = step(planner, request, 44, computed=256, blocks=blocks_of(0))
    assert not moves.saves


def test_a_finished_request_is_saved_to_its_end_and_held_until_it_is_read(planner):
    request = FakeRequest(num_tokens=330, num_prompt_tokens=300)
    step(planner, request, 300, blocks=blocks_of(0, 21))
    assert planner.finished(request, 329)
    assert planner.has_pending_work
    moves = planner.step([], overwrites=True)
    assert moves.held == ["one"]
    assert moves.overwrites
    assert [page.key for page in moves.saves[0].pages] == [bytes([19])]
    planner.moved([], ["one"], set())
    assert not planner.has_pending_work
    assert not planner.finished(request, 329)


def test_a_request_of_which_nothing_was_saved_is_not_held(planner):
    request = FakeRequest(num_tokens=40, num_prompt_tokens=40)
    step(planner, request, 40, blocks=blocks_of(0, 3))
    assert not planner.finished(request, 40)
    assert not planner.has_pending_work


def test_one_that_is_given_up_while_it_loads_makes_way(planner):
    first, second = FakeRequest(), FakeRequest("two")
    matched(planner, first)
    matched(planner, second)
    planner.allocated(first, blocks_of(0), 4 * PAGE)
    assert planner.matched(second, 0) is None
    assert not planner.finished(first, 0)
    assert planner.matched(second, 0) == 4 * PAGE
    planner.moved(["one"], [], {3})


def test_a_preempted_request_has_new_blocks_and_saves_nothing_twice(planner):
    request = FakeRequest()
    step(planner, request, 300, blocks=blocks_of(0))
    assert matched(planner, request) == 4 * PAGE
    planner.allocated(request, blocks_of(200), 4 * PAGE)
    moves = step(planner, request, 44, computed=256, blocks=blocks_of(200), resumed=True)
    assert not moves.saves
    assert planner._requests["one"].blocks == blocks_of(200)


def test_without_external_tokens_nothing_is_planned(planner):
    request = FakeRequest()
    planner.allocated(request, blocks_of(0), 0)
    assert not planner.step([], overwrites=False).loads
