import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest
from store.sample_blocks import bytes_of, keys_of, sample_blocks, sample_key

from tq_store.backends.memory import MemoryBackend
from tq_store.errors import BackendFull
from tq_store.keys import BlockKey
from tq_store.server.read_ahead import ReadAhead
from tq_store.server.window import ByteWindow
from tq_store.tiering.store import TieredStore

MIB = 1 << 20


class RecordingStore(TieredStore):
    """Notes how many keys each get asks for; holds gets back while its gate is closed.

    Says that blocks are at hand only when told so.
    """

    def __init__(self) -> None:
        super().__init__([MemoryBackend(budget_bytes=64 * MIB)])
        self.groups: list[int] = []
        self.is_at_hand = False
        self.gate = asyncio.Event()
        self.gate.set()

    def sizes_at_hand(self, keys: Sequence[BlockKey]) -> list[int]:
        return super().sizes_at_hand(keys) if self.is_at_hand else []

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        self.groups.append(len(keys))
        await self.gate.wait()
        return await super().get(keys)


@pytest.fixture
async def store() -> AsyncIterator[RecordingStore]:
    opened = RecordingStore()
    yield opened
    await opened.close()


def window(limit_bytes: int, used: list[int], patience_s: float = 20.0) -> ByteWindow:
    return ByteWindow("max_outflight", limit_bytes=limit_bytes, patience_s=patience_s, on_change=used.append)


async def blocks_of(store: TieredStore, keys: Sequence[BlockKey], within: ByteWindow) -> list[bytes | None]:
    async with aclosing(ReadAhead(store, within).blocks(keys)) as blocks:
        return [block async for block in blocks]


async def groups_of(store: TieredStore, keys: Sequence[BlockKey], within: ByteWindow) -> list[int]:
    async with aclosing(ReadAhead(store, within).groups(keys, is_quick=True)) as groups:
        return [len(group) async for group in groups]


@pytest.mark.parametrize("is_at_hand", [False, True])
@pytest.mark.parametrize("limit_bytes", [1, 3000, 100 * MIB])
async def test_blocks_come_in_order_whatever_the_window(
    store: RecordingStore, limit_bytes: int, is_at_hand: bool
) -> None:
    store.is_at_hand = is_at_hand
    blocks, used = sample_blocks(40, 1000), [0]
    await store.put(blocks)
    keys = [*keys_of(blocks), sample_key(99)]
    assert await blocks_of(store, keys, window(limit_bytes, used)) == [*bytes_of(blocks), None]
    assert await blocks_of(store, [], window(limit_bytes, used)) == []
    assert used[-1] == 0
    assert max(used) > 0


async def test_groups_grow_as_far_as_the_largest_block_so_far_allows(store: RecordingStore) -> None:
    large, small = sample_blocks(4, 1000), sample_blocks(20, 10, first=10)
    await store.put(large + small)
    absent = [sample_key(number) for number in range(100, 103)]
    asked = [*absent, *keys_of(large), *keys_of(small)]
    # a group is an eighth of the window
    assert len(await blocks_of(store, asked, window(8 * 4000, []))) == len(asked)
    assert store.groups == [1, 2, 4, 3, 3, 3, 3, 3, 3, 2]


async def test_what_is_at_hand_comes_in_groups_as_large_as_the_window_allows(store: RecordingStore) -> None:
    store.is_at_hand = True
    blocks = sample_blocks(300, 1000)
    size_bytes = len(blocks[0][1])
    await store.put(blocks)
    keys = keys_of(blocks)
    used = [0]
    assert await groups_of(store, keys, window(20 * size_bytes, used)) == [20] * 15
    assert max(used) == 20 * size_bytes
    assert used[-1] == 0
    assert await groups_of(store, keys, window(100 * MIB, [])) == [256, 44]
    # for frames, which take longer and count three times where they are small, an eighth of it
    store.groups.clear()
    framed = [0]
    assert len(await blocks_of(store, keys, window(80 * size_bytes, framed))) == 300
    assert store.groups == [3] * 100
    assert max(framed) == 9 * size_bytes
    assert framed[-1] == 0


async def test_what_is_at_hand_takes_the_room_that_others_leave(store: RecordingStore) -> None:
    store.is_at_hand = True
    blocks = sample_blocks(40, 1000)
    size_bytes = len(blocks[0][1])
    await store.put(blocks)
    shared = window(40 * size_bytes, [])
    await shared.take(20 * size_bytes)
    assert await groups_of(store, keys_of(blocks), shared) == [20, 20]
    await shared.take(19 * size_bytes)
    assert shared.free_bytes == size_bytes
    # it asks for an eighth at least, and waits for it in turn
    waiting = asyncio.create_task(groups_of(store, keys_of(blocks), shared))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert shared.free_bytes == 0
    shared.give(19 * size_bytes)
    assert await waiting == [5, 20, 15]


async def test_at_hand_and_elsewhere_mix(store: RecordingStore) -> None:
    store.is_at_hand = True
    blocks = sample_blocks(10, 1000)
    await store.put(blocks)
    absent = [sample_key(number) for number in range(100, 104)]
    asked = [*keys_of(blocks[:3]), *absent, *keys_of(blocks[3:])]
    assert await groups_of(store, asked, window(MIB, [])) == [3, 2, 4, 5]


async def test_what_was_at_hand_may_be_gone_by_the_time_it_is_read(store: RecordingStore) -> None:
    store.is_at_hand = True
    blocks, used = sample_blocks(3, 1000), [0]
    await store.put(blocks)
    full = window(MIB, used)
    await full.take(MIB)
    reading = asyncio.create_task(groups_of(store, keys_of(blocks), full))
    while full.free_bytes or not full._waiting:
        await asyncio.sleep(0)
    await store.delete(keys_of(blocks))
    full.give(MIB)
    assert await reading == [3]
    assert store.groups == [3]
    assert used[-1] == 0


async def test_a_reader_of_what_is_at_hand_that_is_cancelled_holds_nothing(store: RecordingStore) -> None:
    store.is_at_hand = True
    blocks, used = sample_blocks(3, 1000), [0]
    await store.put(blocks)
    store.gate.clear()
    reading = asyncio.create_task(groups_of(store, keys_of(blocks), window(MIB, used)))
    while not used[-1]:
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert used[-1] == 0


async def test_the_next_group_is_read_while_one_is_sent(store: RecordingStore) -> None:
    blocks = sample_blocks(7, 1000)
    await store.put(blocks)
    async with aclosing(ReadAhead(store, window(MIB, [])).blocks(keys_of(blocks))) as reading:
        assert await anext(reading) == blocks[0][1]
        await asyncio.sleep(0)
        assert store.groups == [1, 2]
        assert await anext(reading) == blocks[1][1]
        await asyncio.sleep(0)
        assert store.groups == [1, 2, 4]


async def test_a_reader_that_stops_holds_nothing(store: RecordingStore) -> None:
    blocks, used = sample_blocks(30, 1000), [0]
    await store.put(blocks)
    async with aclosing(ReadAhead(store, window(MIB, used)).blocks(keys_of(blocks))) as reading:
        for _ in range(4):
            await anext(reading)
        store.gate.clear()
        assert used[-1] > 0
    assert used[-1] == 0


async def test_a_reader_that_is_cancelled_again_while_it_stops_holds_nothing(store: RecordingStore) -> None:
    blocks, used = sample_blocks(30, 1000), [0]
    await store.put(blocks)
    within, is_reading = window(MIB, used), asyncio.Event()

    async def read() -> None:
        async with aclosing(ReadAhead(store, within).blocks(keys_of(blocks))) as reading:
            await anext(reading)
            is_reading.set()
            await asyncio.Event().wait()

    for num_turns in range(6):
        is_reading.clear()
        task = asyncio.create_task(read())
        await is_reading.wait()
        assert used[-1] > 0
        task.cancel()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        for _ in range(5):
            await asyncio.sleep(0)
        assert used[-1] == 0


async def test_a_window_that_stays_full_ends_the_reading(store: RecordingStore) -> None:
    blocks, used = sample_blocks(3, 1000), [0]
    await store.put(blocks)
    full = window(MIB, used, patience_s=0.01)
    await full.take(MIB)
    with pytest.raises(BackendFull):
        await blocks_of(store, keys_of(blocks), full)
    assert used[-1] == MIB


async def test_a_failure_ahead_is_nobodys_business_once_the_reader_has_left(store: RecordingStore) -> None:
    blocks, used = sample_blocks(3, 1000), [0]
    await store.put(blocks)
    full = window(4000, used, patience_s=0.01)
    async with aclosing(ReadAhead(store, full).blocks(keys_of(blocks))) as reading:
        await anext(reading)
        await asyncio.sleep(0.05)  # the group ahead has given up by now
    assert used[-1] == 0
