"""Eviction orders: what stays, what goes, that the bytes add up, that a call costs the same at any size."""

import copy
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store.sample_blocks import OTHER_NAMESPACE, sample_key

from tq_store.backends.policy import EvictionPolicy, Lru, S3Fifo
from tq_store.backends.usage import GROUP_BYTES

POLICIES = [S3Fifo, Lru]
KEYS = [sample_key(number) for number in range(1000)]


def admit_all(policy: EvictionPolicy, numbers: range, size_bytes: int = 1) -> list[int]:
    return [KEYS.index(victim) for n in numbers for victim in policy.admit(KEYS[n], size_bytes)]


@pytest.mark.parametrize("make", POLICIES)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["admit", "touch", "remove"]), st.integers(0, 30), st.integers(0, 40)),
        max_size=200,
    )
)
def test_bytes_and_membership_add_up_whatever_happens(
    make: Callable[[int], EvictionPolicy], calls: list[tuple[str, int, int]]
) -> None:
    policy = make(100)
    held: dict[int, int] = {}
    for call, number, size_bytes in calls:
        if call == "touch":
            policy.touch(KEYS[number])
        elif call == "remove":
            assert policy.remove(KEYS[number]) == (held.pop(number, None) is not None)
        elif number not in held:
            victims = [KEYS.index(victim) for victim in policy.admit(KEYS[number], size_bytes)]
            assert number not in victims
            # nothing is dropped without need
            assert not victims or sum(held.values()) + size_bytes > 100
            for victim in victims:
                del held[victim]
            held[number] = size_bytes
        assert policy.used_bytes == sum(held.values()) <= 100
        assert len(policy) == len(held)
        assert {n for n in range(31) if KEYS[n] in policy} == set(held)


@pytest.mark.parametrize("make", POLICIES)
def test_admitting_twice_is_a_mistake_of_the_caller(make: Callable[[int], EvictionPolicy]) -> None:
    policy = make(10)
    policy.admit(KEYS[0], 1)
    with pytest.raises(ValueError, match="is in already"):
        policy.admit(KEYS[0], 1)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("size_bytes", [11, -1])
def test_a_size_outside_the_budget_is_a_mistake_of_the_caller(
    make: Callable[[int], EvictionPolicy], size_bytes: int
) -> None:
    with pytest.raises(ValueError, match=f"{size_bytes} bytes cannot enter a budget of 10"):
        make(10).admit(KEYS[0], size_bytes)


def test_lru_drops_what_was_used_longest_ago() -> None:
    policy = Lru(3)
    admit_all(policy, range(3))
    policy.touch(KEYS[0])
    assert admit_all(policy, range(3, 5)) == [1, 2]


def test_s3fifo_drops_unused_blocks_in_order_of_arrival() -> None:
    policy = S3Fifo(10)
    admit_all(policy, range(10))
    assert admit_all(policy, range(10, 17)) == [0, 1, 2, 3, 4, 5, 6]


def test_s3fifo_keeps_used_blocks_through_a_scan_that_empties_lru() -> None:
    kept = {}
    for make in POLICIES:
        policy = make(100)
        admit_all(policy, range(50))
        for number in range(50):
            policy.touch(KEYS[number])
        admit_all(policy, range(100, 1000))
        kept[make] = sum(KEYS[number] in policy for number in range(50))
    assert kept == {S3Fifo: 50, Lru: 0}


def test_s3fifo_sends_a_block_that_comes_back_to_the_main_queue() -> None:
    policy = S3Fifo(10)
    admit_all(policy, range(11))
    assert KEYS[0] not in policy
    policy.admit(KEYS[0], 1)
    admit_all(policy, range(100, 200))
    assert KEYS[0] in policy, "remembered as a ghost, so a scan does not touch it"


def test_s3fifo_forgets_ghosts_beyond_a_budget_of_bytes() -> None:
    policy = S3Fifo(10)
    admit_all(policy, range(11))
    admit_all(policy, range(11, 22))
    policy.admit(KEYS[0], 1)
    admit_all(policy, range(100, 200))
    assert KEYS[0] not in policy, "eleven others have left since"


def test_s3fifo_does_not_remember_deleted_blocks() -> None:
    policy = S3Fifo(10)
    admit_all(policy, range(10))
    policy.remove(KEYS[9])
    policy.admit(KEYS[9], 1)
    assert 9 in admit_all(policy, range(100, 200))


def test_s3fifo_lets_go_of_main_blocks_that_are_no_longer_used() -> None:
    policy = S3Fifo(10)
    admit_all(policy, range(10))
    for number in range(10):
        policy.touch(KEYS[number])
    admit_all(policy, range(10, 20))
    assert sum(KEYS[number] in policy for number in range(10)) == 7, "the small queue keeps its share"
    for number in range(20, 60):
        policy.admit(KEYS[number], 1)
        policy.touch(KEYS[number])
    assert not any(KEYS[number] in policy for number in range(10))


def full_of_main_blocks() -> S3Fifo:
    """Ten blocks of budget: 0 to 6 in the main queue, unused there, and three in the small queue."""
    policy = S3Fifo(10)
    admit_all(policy, range(10))
    for number in range(10):
        policy.touch(KEYS[number])
    admit_all(policy, range(10, 20))
    assert [n for n in range(20) if KEYS[n] in policy] == [3, 4, 5, 6, 7, 8, 9, 17, 18, 19]
    return policy


def test_s3fifo_gives_used_main_blocks_another_round() -> None:
    policy = full_of_main_blocks()
    policy.touch(KEYS[3])
    policy.touch(KEYS[5])
    for number in range(20, 23):
        policy.touch(KEYS[number - 3])
        policy.admit(KEYS[number], 1)
    # three blocks moved up; the room came from the front of the main queue, past the used ones
    assert [n for n in range(10) if KEYS[n] in policy] == [3, 5, 8, 9]


def test_s3fifo_forgets_main_blocks_when_told() -> None:
    policy = full_of_main_blocks()
    assert policy.remove(KEYS[3])
    assert not policy.remove(KEYS[3])
    assert (len(policy), policy.used_bytes) == (9, 9)
    assert policy.admit(KEYS[20], 1) == []


def test_s3fifo_caps_what_past_use_is_worth() -> None:
    policy = full_of_main_blocks()
    for _ in range(1000):
        policy.touch(KEYS[9])
    for number in range(20, 100):
        policy.admit(KEYS[number], 1)
        policy.touch(KEYS[number])
    assert KEYS[9] not in policy


def test_s3fifo_counts_bytes_not_blocks() -> None:
    policy = S3Fifo(100)
    admit_all(policy, range(4), size_bytes=25)
    policy.touch(KEYS[0])
    assert admit_all(policy, range(4, 5), size_bytes=50) == [1, 2]
    assert policy.used_bytes == 100


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["admit", "touch", "remove", "ask"]), st.integers(0, 30)), max_size=200
    )
)
def test_what_of_a_group_is_first_to_go_is_known_whenever_it_is_first_asked_for(
    calls: list[tuple[str, int]],
) -> None:
    """A policy that notes groups from the start says the same as one that is asked for the first time."""
    keys = [sample_key(number, bytes([number % 3]) * 32) for number in range(31)]
    noting, fresh = S3Fifo(100), S3Fifo(100)
    for call, number in [*calls, *(("ask", group) for group in range(3))]:
        if call == "ask":
            group = keys[number][:GROUP_BYTES]
            chosen = noting.first_to_go(group, num_bytes=1000, num_blocks=0)
            assert set(chosen) == {key for key in keys if key in noting and key.startswith(group)}
            assert noting.first_to_go(group, num_bytes=0, num_blocks=2) == chosen[:2]
            assert copy.deepcopy(fresh).first_to_go(group, num_bytes=1000, num_blocks=0) == chosen
        else:
            for policy in (noting, fresh):
                if call == "admit" and keys[number] not in policy:
                    policy.admit(keys[number], 11)
                elif call == "touch":
                    policy.touch(keys[number])
                elif call == "remove":
                    policy.remove(keys[number])


def test_what_a_small_group_costs_does_not_grow_with_the_others() -> None:
    def seconds(num_others: int) -> float:
        policy = S3Fifo(1 << 40)
        for number in range(num_others):
            policy.admit(sample_key(number), 1)
        mine = sample_key(0, OTHER_NAMESPACE)
        policy.admit(mine, 1)
        policy.first_to_go(mine[:GROUP_BYTES], num_bytes=1, num_blocks=0)
        start = time.process_time()
        for _ in range(1000):
            assert policy.first_to_go(mine[:GROUP_BYTES], num_bytes=1, num_blocks=0) == [mine]
        return time.process_time() - start

    # linear work would show as a factor of 200
    assert seconds(20_000) < 10 * min(seconds(100) for _ in range(3))


@pytest.mark.parametrize("make", POLICIES)
def test_a_call_costs_the_same_in_a_large_policy(make: Callable[[int], EvictionPolicy]) -> None:
    def best_of_three(num_blocks: int) -> float:
        """Seconds for 20000 admissions into a full policy whose blocks were all used."""
        times = []
        for _ in range(3):
            policy = make(num_blocks)
            for number in range(num_blocks):
                policy.admit(number.to_bytes(64, "little"), 1)
                policy.touch(number.to_bytes(64, "little"))
            start = time.process_time()
            for number in range(num_blocks, num_blocks + 20_000):
                policy.admit(number.to_bytes(64, "little"), 1)
            times.append(time.process_time() - start)
        return min(times)

    # linear work would show as a factor of 50
    assert best_of_three(50_000) < 10 * best_of_three(1000)
