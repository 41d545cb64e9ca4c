import asyncio

import pytest

from tq_store.errors import BackendFull
from tq_store.server.window import ByteWindow


class Watched:
    """A window of 100 bytes that notes how much of it is in use."""

    def __init__(self, patience_s: float = 20.0) -> None:
        self.used: list[int] = []
        self.window = ByteWindow(
            "max_outflight", limit_bytes=100, patience_s=patience_s, on_change=self.used.append
        )

    def begin(self, num_bytes: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self.window.take(num_bytes))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_step_is_cut_short_once_somebody_waits() -> None:
    watched = Watched()
    await watched.window.take(100)
    started = asyncio.get_running_loop().time()

    async def stand_still() -> None:
        async with watched.window.step(stall_s=20.0, hurry_s=0.05):
            await asyncio.Event().wait()

    still = asyncio.create_task(stand_still())
    await settle()
    waiting = watched.begin(10)
    with pytest.raises(TimeoutError):
        await still
    assert asyncio.get_running_loop().time() - started < 10
    watched.window.give(100)
    await waiting


async def test_a_step_that_begins_while_somebody_waits_is_short_too() -> None:
    watched = Watched()
    await watched.window.take(100)
    waiting = watched.begin(10)
    await settle()
    with pytest.raises(TimeoutError):
        async with watched.window.step(stall_s=20.0, hurry_s=0.05):
            await asyncio.Event().wait()
    watched.window.give(100)
    await waiting


async def test_steps_may_take_their_time_while_nobody_waits() -> None:
    watched = Watched()
    await watched.window.take(100)
    async with watched.window.step(stall_s=20.0, hurry_s=0.01):
        await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        async with watched.window.step(stall_s=0.05, hurry_s=0.01):
            await asyncio.Event().wait()


async def test_a_step_is_never_made_longer() -> None:
    watched = Watched()
    await watched.window.take(100)

    async def stand_still() -> None:
        async with watched.window.step(stall_s=0.05, hurry_s=20.0):
            await asyncio.Event().wait()

    still = asyncio.create_task(stand_still())
    await settle()
    waiting = watched.begin(10)
    with pytest.raises(TimeoutError):
        await still
    watched.window.give(100)
    await waiting


async def test_what_fits_is_let_in_at_once() -> None:
    watched = Watched()
    await watched.window.take(60)
    await watched.window.take(40)
    watched.window.give(60)
    await watched.window.take(60)
    assert watched.used == [60, 100, 40, 100]


async def test_who_waits_is_served_in_order_even_if_a_later_one_would_fit() -> None:
    watched = Watched()
    await watched.window.take(100)
    large, small = watched.begin(80), watched.begin(30)
    await settle()
    watched.window.give(50)
    await settle()
    assert (large.done(), small.done()) == (False, False)
    watched.window.give(50)
    await settle()
    assert (large.done(), small.done()) == (True, False)
    watched.window.give(80)
    await small
    assert watched.used[-1] == 30


async def test_more_than_the_window_is_let_in_alone() -> None:
    watched = Watched()
    await watched.window.take(1)
    huge = watched.begin(1000)
    await settle()
    assert not huge.done()
    watched.window.give(1)
    await huge
    after = watched.begin(1)
    await settle()
    assert not after.done()
    watched.window.give(1000)
    await after


async def test_who_is_not_served_in_time_is_told_which_setting_it_was() -> None:
    watched = Watched(patience_s=0.01)
    await watched.window.take(100)
    with pytest.raises(BackendFull, match="7 bytes found no room in max_outflight of 100 bytes"):
        await watched.window.take(7)
    watched.window.give(100)
    assert watched.used[-1] == 0


async def test_who_gives_up_leaves_its_place_to_those_behind() -> None:
    watched = Watched()
    await watched.window.take(90)
    large, small = watched.begin(50), watched.begin(10)
    await settle()
    large.cancel()
    await small
    assert large.cancelled()
    assert watched.used[-1] == 100


async def test_who_is_cancelled_as_its_turn_comes_keeps_nothing() -> None:
    watched = Watched()
    await watched.window.take(100)
    waiting = watched.begin(50)
    await settle()
    watched.window.give(100)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert watched.used[-1] == 0


async def test_who_was_cancelled_and_has_not_run_since_is_passed_over() -> None:
    watched = Watched()
    await watched.window.take(100)
    first, second = watched.begin(50), watched.begin(60)
    await settle()
    first.cancel()
    watched.window.give(100)
    await second
    assert watched.used[-1] == 60


async def test_a_share_can_turn_out_larger_than_taken() -> None:
    watched = Watched()
    await watched.window.take(10)
    watched.window.adjust(200)
    waiting = watched.begin(1)
    await settle()
    assert not waiting.done()
    watched.window.give(210)
    await waiting
