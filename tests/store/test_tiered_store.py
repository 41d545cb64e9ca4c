"""The tiered store over real tiers: memory, a disk directory, a Redis server that stalls and dies."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import xxhash
from store.redis_process import Proxy, RedisProcess
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    block_bytes,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)

from tq_store.backends.base import Backend
from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.backends.redis_shard import _LOOKUPS
from tq_store.block import HEADER_LAYOUT
from tq_store.errors import BackendError, ConfigError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.tiering.store import TieredStore

STORED, PRESENT = PutOutcome.STORED, PutOutcome.PRESENT
REFUSED, INVALID = PutOutcome.REFUSED, PutOutcome.INVALID


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def store_of(
    *tiers: Backend, write_queue_bytes: int = 256 << 20, clock: Clock | None = None
) -> AsyncIterator[TieredStore]:
    store = TieredStore(tiers, write_queue_bytes=write_queue_bytes, clock=clock or Clock())
    try:
        yield store
    finally:
        await store.close()


def memory(budget_bytes: int = 64 << 20, name: str = "memory") -> MemoryBackend:
    return MemoryBackend(budget_bytes=budget_bytes, name=name)


async def disk(directory: Path) -> DiskBackend:
    return await DiskBackend.open(directory, budget_bytes=256 << 20)


async def redis(url: str, timeout_s: float = 10.0, lookup_timeout_s: float | None = None) -> RedisBackend:
    limits = RedisLimits(timeout_s=timeout_s, lookup_timeout_s=lookup_timeout_s or timeout_s, census_s=None)
    return await RedisBackend.open(url, limits=limits)


def file_of(directory: Path, key: BlockKey) -> Path:
    return directory / "blocks" / key[32:33].hex() / f"{key[:32].hex()}-{key[32:].hex()}"


def redis_key(key: BlockKey) -> str:
    return f"tq:1:{key[:32].hex()}:{key[32:].hex()}"


def counters(store: TieredStore) -> dict[str, int]:
    """Those that are not zero; unlike the whole of the stats, without asking the tiers."""
    return dict(+store._counters)


class TestTiers:
    async def test_a_put_is_in_the_top_tier_now_and_below_after_a_flush(self, tmp_path: Path) -> None:
        top, bottom = memory(), await disk(tmp_path)
        blocks = sample_blocks(5)
        async with store_of(top, bottom) as store:
            assert await store.put(blocks) == [STORED] * 5
            assert await top.get(keys_of(blocks)) == bytes_of(blocks)
            await store.flush()
            assert await bottom.get(keys_of(blocks)) == bytes_of(blocks)
            assert await store.put(blocks) == [PRESENT] * 5
            assert counters(store) == {}

    async def test_contains_and_lookup_see_all_tiers(self, tmp_path: Path) -> None:
        top, bottom = memory(), await disk(tmp_path)
        blocks = sample_blocks(6)
        async with store_of(top, bottom) as store:
            await top.put(blocks[:2])
            await bottom.put([blocks[2], blocks[4]])
            keys = keys_of(blocks)
            assert await store.contains(keys) == [True, True, True, False, True, False]
            assert await store.lookup(keys) == 3
            assert await store.lookup(keys[:3]) == 3
            assert await store.lookup(keys[3:]) == 0
            assert await store.lookup([]) == 0
            assert await top.contains(keys) == [True, True] + [False] * 4, "asking promotes nothing"

    async def test_a_hit_below_is_promoted(self, tmp_path: Path) -> None:
        top, bottom = memory(), await disk(tmp_path)
        blocks = sample_blocks(4)
        async with store_of(top, bottom) as store:
            await top.put(blocks[:1])
            await bottom.put(blocks[:3])
            asked = [*keys_of(blocks), blocks[2][0]]
            assert await store.get(asked) == [*bytes_of(blocks[:3]), None, blocks[2][1]]
            assert await top.get(keys_of(blocks[:3])) == bytes_of(blocks[:3])
            assert counters(store) == {"hits_memory": 1, "hits_disk": 2, "misses": 1, "promotions": 2}
            assert await store.get(keys_of(blocks[:3])) == bytes_of(blocks[:3])
            assert counters(store)["hits_memory"] == 4

    async def test_a_hit_at_the_bottom_reaches_every_tier_above(
        self, tmp_path: Path, redis_server: RedisProcess
    ) -> None:
        top, middle, bottom = memory(), await disk(tmp_path), await redis(redis_server.url)
        key, block = sample_block(1)
        async with store_of(top, middle, bottom) as store:
            await bottom.put([(key, block)])
            assert await store.get([key]) == [block]
            assert await top.get([key]) == [block]
            await store.flush()
            assert await middle.get([key]) == [block]
            assert counters(store) == {"hits_redis": 1, "promotions": 1}

    async def test_a_single_tier(self) -> None:
        blocks = sample_blocks(2)
        async with store_of(memory()) as store:
            assert await store.put(blocks[:1]) == [STORED]
            assert await store.get(keys_of(blocks)) == [blocks[0][1], None]
            assert await store.get([]) == []
            assert await store.contains([]) == []
            assert await store.put([]) == []
            assert await store.delete([]) == []
            assert counters(store) == {"hits_memory": 1, "misses": 1}

    async def test_a_block_too_large_for_the_top_is_refused_there_and_kept_below(
        self, tmp_path: Path
    ) -> None:
        key, block = sample_block(1, 5000)
        async with store_of(memory(1000), await disk(tmp_path)) as store:
            assert await store.put([(key, block)]) == [REFUSED]
            await store.flush()
            assert await store.get([key]) == [block]
            assert counters(store) == {"refused": 1, "hits_disk": 1}

    async def test_a_batch_larger_than_one_write(self, tmp_path: Path) -> None:
        blocks = sample_blocks(9, 4 << 20)
        bottom = await disk(tmp_path)
        async with store_of(memory(), bottom) as store:
            await store.put(blocks)
            await store.flush()
            assert await bottom.contains(keys_of(blocks)) == [True] * 9

    async def test_close_writes_what_waits(self, tmp_path: Path) -> None:
        blocks = sample_blocks(20, 100_000)
        async with store_of(memory(), await disk(tmp_path)) as store:
            await store.put(blocks)
            await store.close()
            await store.close()
            assert await store.get(keys_of(blocks[:1])) == [None], "misses from then on"
            assert await store.put(blocks[:1]) == [REFUSED]
            assert counters(store)["dropped_writes"] == 1
        async with store_of(memory(), await disk(tmp_path)) as store:
            assert await store.get(keys_of(blocks)) == bytes_of(blocks)

    @pytest.mark.parametrize("names", [[], ["a", "a"]])
    async def test_tiers_need_distinct_names(self, names: list[str]) -> None:
        with pytest.raises(ConfigError, match="tiers with distinct names, at least one"):
            TieredStore([memory(name=name) for name in names])

    async def test_stats_of_every_tier(self, tmp_path: Path) -> None:
        async with store_of(memory(), await disk(tmp_path)) as store:
            await store.put(sample_blocks(3))
            await store.flush()
            stats = await store.stats()
        assert {name: tier.num_blocks for name, tier in stats.tiers.items()} == {"memory": 3, "disk": 3}
        assert set(stats.counters) == {
            *("hits_memory", "hits_disk", "misses", "joined_loads", "promotions", "quarantined"),
            *("unsupported", "dropped_writes", "refused", "invalid"),
            *("tier_errors_memory", "tier_errors_disk"),
        }


class TestSoundness:
    @pytest.mark.parametrize("payload_bytes", [256, 2 << 20], ids=["inline", "in a thread"])
    async def test_blocks_that_are_not_sound_do_not_come_in(self, payload_bytes: int) -> None:
        good, other, bad = sample_blocks(3, payload_bytes)
        flipped = bytearray(bad[1])
        flipped[-1] ^= 1
        top, bottom = memory(), memory(name="bottom")
        async with store_of(top, bottom) as store:
            offered = [(bad[0], bytes(flipped)), good, (bad[0], other[1]), (bad[0], b"")]
            assert await store.put(offered) == [INVALID, STORED, INVALID, INVALID]
            await store.flush()
            for tier in (top, bottom):
                assert await tier.contains([good[0], bad[0]]) == [True, False]
            assert counters(store) == {"invalid": 3}

    @pytest.mark.parametrize("payload_bytes", [256, 2 << 20], ids=["inline", "in a thread"])
    @pytest.mark.parametrize("position", [0, 20, 100, 255, 256, -1])
    async def test_a_byte_flipped_on_disk(
        self, tmp_path: Path, position: int, payload_bytes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocks = sample_blocks(3, payload_bytes)
        bottom = await disk(tmp_path)
        await bottom.put(blocks)
        file = file_of(tmp_path, blocks[1][0])
        flipped = bytearray(file.read_bytes())
        flipped[position] ^= 0x10
        file.write_bytes(flipped)
        async with store_of(memory(), bottom) as store:
            found = await store.get(keys_of(blocks))
            assert found[1] is None
            assert (found[0], found[2]) == (blocks[0][1], blocks[2][1])
            assert counters(store) == {**{"hits_disk": 2, "misses": 1, "promotions": 2, "quarantined": 1}}
            assert f"corrupt block {blocks[1][0].hex()[64:80]} in the disk tier" in caplog.text
            assert not file.exists()
            assert (tmp_path / "quarantine" / file.name).read_bytes() == flipped
            assert await store.put(blocks) == [PRESENT, STORED, PRESENT], "its place is free again"
            await store.flush()
            assert (await bottom.get([blocks[1][0]])) == [blocks[1][1]]

    @pytest.mark.parametrize("field", ["format_version", "flags", "reserved"])
    async def test_a_block_of_a_newer_server_is_a_miss_and_stays(self, tmp_path: Path, field: str) -> None:
        (key, block), other = sample_blocks(2)
        newer = bytearray(block)
        newer[HEADER_LAYOUT[field][0]] += 1
        newer[248:256] = xxhash.xxh3_64_intdigest(newer[:248]).to_bytes(8, "little")
        bottom = await disk(tmp_path)
        await bottom.put([(key, bytes(newer)), other])
        async with store_of(memory(), bottom) as store:
            assert await store.get([key, other[0]]) == [None, other[1]]
            assert counters(store) == {**{"hits_disk": 1, "misses": 1, "promotions": 1, "unsupported": 1}}
            assert await store.put([(key, block)]) == [STORED]
            await store.flush()
            assert file_of(tmp_path, key).read_bytes() == newer

    async def test_half_a_file_is_never_served(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        bottom = await disk(tmp_path)
        await bottom.put([(key, block)])
        file_of(tmp_path, key).write_bytes(block[: len(block) // 2])
        async with store_of(memory(), bottom) as store:
            assert await store.get([key]) == [None]
            assert counters(store) == {"misses": 1, "quarantined": 1}

    async def test_a_single_tier_outside_this_process_is_checked_too(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        async with store_of(await disk(tmp_path)) as store:
            await store.put([(key, block)])
            file_of(tmp_path, key).write_bytes(block[:-1] + bytes([block[-1] ^ 1]))
            assert await store.get([key]) == [None]
            assert counters(store) == {"misses": 1, "quarantined": 1}

    async def test_a_byte_flipped_in_redis(self, redis_server: RedisProcess) -> None:
        blocks = sample_blocks(3)
        bottom = await redis(redis_server.url)
        await bottom.put(blocks)
        redis_server.command("SETRANGE", redis_key(blocks[1][0]), "300", "oops")
        async with store_of(memory(), bottom) as store:
            assert await store.get(keys_of(blocks)) == [blocks[0][1], None, blocks[2][1]]
            assert counters(store)["quarantined"] == 1
            assert await bottom.contains(keys_of(blocks)) == [True, False, True]

    async def test_a_sound_copy_further_down_is_found_and_heals_the_tier_above(
        self, tmp_path: Path, redis_server: RedisProcess
    ) -> None:
        key, block = sample_block(1)
        middle, bottom = await disk(tmp_path), await redis(redis_server.url)
        await middle.put([(key, block)])
        await bottom.put([(key, block)])
        file_of(tmp_path, key).write_bytes(b"rot" + block[3:])
        async with store_of(memory(), middle, bottom) as store:
            assert await store.get([key]) == [block]
            assert counters(store) == {"hits_redis": 1, "promotions": 1, "quarantined": 1}
            await store.flush()
            assert file_of(tmp_path, key).read_bytes() == block


class TestSingleFlight:
    @pytest.fixture
    async def proxy(self, redis_server: RedisProcess, tmp_path: Path) -> AsyncIterator[Proxy]:
        async with Proxy(redis_server, tmp_path) as proxy:
            yield proxy

    def num_reads(self, proxy: Proxy, key: BlockKey) -> int:
        return sum(request.count(redis_key(key).encode()) for request in proxy.requests())

    async def started(self, proxy: Proxy, calls: Sequence[asyncio.Task[list[bytes | None]]]) -> None:
        """Return when the calls wait, and the server's reply to the first is held back."""
        await proxy.requested.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(call.done() for call in calls)

    async def test_a_hundred_gets_of_one_key_are_one_read(self, proxy: Proxy) -> None:
        key, block = sample_block(1)
        bottom = await redis(proxy.url)
        await bottom.put([(key, block)])
        async with store_of(memory(), bottom) as store:
            proxy.bursts.clear()
            proxy.open_gate.clear()
            proxy.requested.clear()
            calls = [asyncio.create_task(store.get([key])) for _ in range(100)]
            await self.started(proxy, calls)
            proxy.open_gate.set()
            assert await asyncio.gather(*calls) == [[block]] * 100
            assert self.num_reads(proxy, key) == 1
            assert counters(store) == {"hits_redis": 1, "promotions": 1, "joined_loads": 99}

    async def test_gets_that_overlap_load_only_what_nobody_loads(self, proxy: Proxy) -> None:
        blocks = sample_blocks(6)
        bottom = await redis(proxy.url)
        await bottom.put(blocks)
        async with store_of(memory(), bottom) as store:
            proxy.bursts.clear()
            proxy.open_gate.clear()
            proxy.requested.clear()
            parts = [blocks[:4], blocks[2:], blocks]
            calls = [asyncio.create_task(store.get(keys_of(part))) for part in parts]
            await self.started(proxy, calls)
            proxy.open_gate.set()
            assert await asyncio.gather(*calls) == [bytes_of(part) for part in parts]
            assert [self.num_reads(proxy, key) for key in keys_of(blocks)] == [1] * 6

    async def test_a_cancelled_first_caller_does_not_fail_the_others(self, proxy: Proxy) -> None:
        key, block = sample_block(1)
        bottom = await redis(proxy.url)
        await bottom.put([(key, block)])
        async with store_of(memory(), bottom) as store:
            proxy.bursts.clear()
            proxy.open_gate.clear()
            proxy.requested.clear()
            first, *others = [asyncio.create_task(store.get([key])) for _ in range(5)]
            await self.started(proxy, [first, *others])
            first.cancel()
            others[0].cancel()
            await asyncio.wait([first, others[0]])
            assert first.cancelled()
            late = asyncio.create_task(store.get([key]))
            proxy.open_gate.set()
            assert await asyncio.gather(*others[1:], late) == [[block]] * 4
            assert self.num_reads(proxy, key) == 1

    async def test_a_load_that_nobody_waits_for_ends_before_close(self, proxy: Proxy) -> None:
        key, block = sample_block(1)
        bottom, top = await redis(proxy.url), memory()
        await bottom.put([(key, block)])
        async with store_of(top, bottom) as store:
            proxy.open_gate.clear()
            proxy.requested.clear()
            call = asyncio.create_task(store.get([key]))
            await self.started(proxy, [call])
            call.cancel()
            proxy.open_gate.set()
            await store.flush()
            assert await top.get([key]) == [block], "the work was not for nothing"

    async def test_a_failed_load_is_a_miss_for_all_and_the_next_get_tries_again(self, proxy: Proxy) -> None:
        key, block = sample_block(1)
        clock = Clock()
        bottom = await redis(proxy.url)
        await bottom.put([(key, block)])
        async with store_of(memory(), bottom, clock=clock) as store:
            proxy.cut_after = 3
            assert await asyncio.gather(*(store.get([key]) for _ in range(10))) == [[None]] * 10
            proxy.cut_after = None
            clock.now_s += 10
            assert await store.get([key]) == [block]


class TestWriteBehind:
    @pytest.fixture
    async def proxy(self, redis_server: RedisProcess, tmp_path: Path) -> AsyncIterator[Proxy]:
        async with Proxy(redis_server, tmp_path) as proxy:
            yield proxy

    async def test_the_queue_is_bounded_and_overflow_is_dropped_and_counted(self, proxy: Proxy) -> None:
        blocks = sample_blocks(10, 1000)
        bottom = await redis(proxy.url)
        async with store_of(memory(), bottom, write_queue_bytes=4 * block_bytes(1000)) as store:
            proxy.open_gate.clear()
            proxy.requested.clear()
            assert await store.put(blocks[:2]) == [STORED] * 2
            await proxy.requested.wait()
            # those being written count as well
            assert await store.put(blocks[2:]) == [STORED] * 8
            assert counters(store) == {"dropped_writes": 6}
            proxy.open_gate.set()
            await store.flush()
            assert await bottom.contains(keys_of(blocks)) == [True] * 4 + [False] * 6
            assert await store.put(blocks[4:8]) == [PRESENT] * 4
            await store.flush()
            assert await bottom.contains(keys_of(blocks)) == [True] * 8 + [False] * 2, "room again"

    async def test_a_block_that_waits_is_not_queued_twice(self, proxy: Proxy) -> None:
        first, second = sample_blocks(2, 1000)
        bottom = await redis(proxy.url)
        async with store_of(memory(), bottom, write_queue_bytes=2 * block_bytes(1000)) as store:
            proxy.open_gate.clear()
            proxy.requested.clear()
            await store.put([first])
            await proxy.requested.wait()
            for _ in range(5):
                await store.put([second])
            assert counters(store) == {}
            proxy.open_gate.set()

    async def test_what_another_replica_has_stored_is_not_sent(self, proxy: Proxy) -> None:
        blocks = sample_blocks(3, 100_000)
        bottom = await redis(proxy.url)
        await bottom.put(blocks)
        async with store_of(memory(), bottom) as store:
            proxy.bursts.clear()
            await store.put(blocks)
            await store.flush()
            assert sum(map(len, proxy.requests())) < 2000

    async def test_a_deleted_block_is_not_written_later(self, proxy: Proxy) -> None:
        blocks = sample_blocks(4, 1000)
        bottom = await redis(proxy.url)
        async with store_of(memory(), bottom) as store:
            # two connections, so that a deletion that did not wait for the write could overtake it
            await asyncio.gather(bottom.contains([sample_key(9)]), bottom.contains([sample_key(9)]))
            proxy.open_gate.clear()
            proxy.requested.clear()
            await store.put(blocks[:2])
            await proxy.requested.wait()
            await store.put(blocks[2:])
            deletion = asyncio.create_task(store.delete(keys_of([blocks[0], blocks[2]])))
            await asyncio.wait([deletion], timeout=0.3)
            proxy.open_gate.set()
            assert await deletion == [True, True]
            await store.flush()
            assert await store.contains(keys_of(blocks)) == [False, True, False, True]

    async def test_a_key_may_come_twice_in_a_deletion(self, proxy: Proxy) -> None:
        blocks = sample_blocks(2, 1000)
        bottom = await redis(proxy.url)
        async with store_of(memory(), bottom, write_queue_bytes=2 * block_bytes(1000)) as store:
            proxy.open_gate.clear()
            proxy.requested.clear()
            await store.put(blocks[:1])
            await proxy.requested.wait()
            await store.put(blocks[1:])
            deletion = asyncio.create_task(store.delete([blocks[1][0]] * 2))
            proxy.open_gate.set()
            assert any(await deletion)
            await store.flush()
            assert await store.contains(keys_of(blocks)) == [True, False]
            await store.put(sample_blocks(2, 1000, first=10))
            assert counters(store) == {}, "the queue is as empty as it was"

    async def test_a_purged_namespace_is_not_written_later(self, proxy: Proxy) -> None:
        ours, theirs = sample_blocks(2, 1000), sample_blocks(2, 1000, namespace=OTHER_NAMESPACE)
        bottom = await redis(proxy.url)
        async with store_of(memory(), bottom) as store:
            proxy.open_gate.clear()
            proxy.requested.clear()
            await store.put([ours[0], theirs[0]])
            await proxy.requested.wait()
            await store.put([ours[1], theirs[1]])
            purge = asyncio.create_task(store.purge(NAMESPACE))
            proxy.open_gate.set()
            assert await purge == 3, "two in memory, one that was being written"
            await store.flush()
            assert await store.contains(keys_of(ours + theirs)) == [False, False, True, True]


class TestRemoval:
    async def test_a_load_under_way_does_not_bring_a_deleted_block_back(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        bottom = await disk(tmp_path)
        await bottom.put([(key, block)])
        # a pipe in place of the file holds the read up; its second name outlives the deletion
        file, other_end = file_of(tmp_path, key), tmp_path / "other end"
        file.unlink()
        os.mkfifo(file)
        os.link(file, other_end)
        async with store_of(memory(), bottom) as store:
            call = asyncio.create_task(store.get([key]))
            await asyncio.sleep(0)
            deletion = asyncio.create_task(store.delete([key]))
            await asyncio.wait([deletion], timeout=0.3)
            await asyncio.to_thread(other_end.write_bytes, block)
            assert await call == [block]
            assert await deletion == [True]
            assert await store.contains([key]) == [False]

    async def test_a_load_that_begins_meanwhile_does_not_either(self, tmp_path: Path) -> None:
        key, block = sample_block(1)
        bottom = await disk(tmp_path)
        async with store_of(memory(), bottom) as store:
            await store.put([(key, block)])
            await store.flush()
            with bottom._lock:
                deletion = asyncio.create_task(store.delete([key]))
                for _ in range(5):
                    await asyncio.sleep(0)
                call = asyncio.create_task(store.get([key]))
                await asyncio.wait([call], timeout=0.3)
            assert await call == [block]
            assert await deletion == [True]
            assert await store.contains([key]) == [False]

    async def test_delete_from_every_tier(self, tmp_path: Path) -> None:
        top, bottom = memory(), await disk(tmp_path)
        blocks = sample_blocks(4)
        async with store_of(top, bottom) as store:
            await top.put([blocks[0], blocks[1]])
            await bottom.put([blocks[1], blocks[2]])
            assert await store.delete(keys_of(blocks)) == [True, True, True, False]
            assert await store.contains(keys_of(blocks)) == [False] * 4

    async def test_purge_counts_copies(self, tmp_path: Path) -> None:
        ours, theirs = sample_blocks(3), sample_blocks(2, namespace=OTHER_NAMESPACE)
        async with store_of(memory(), await disk(tmp_path)) as store:
            await store.put(ours + theirs)
            await store.flush()
            assert await store.purge(NAMESPACE) == 6
            assert await store.contains(keys_of(ours + theirs)) == [False] * 3 + [True] * 2
            assert await store.purge(None) == 4

    @pytest.mark.parametrize("namespace", [b"", NAMESPACE[:31], NAMESPACE + b"x"])
    async def test_purge_wants_a_whole_digest(self, namespace: bytes) -> None:
        async with store_of(memory()) as store:
            await store.put(sample_blocks(1))
            with pytest.raises(ValueError, match=f"a namespace digest has 32 bytes, not {len(namespace)}"):
                await store.purge(namespace)
            assert await store.lookup([sample_key(0)]) == 1


class TestOutages:
    @pytest.fixture
    def server(self, tmp_path: Path) -> RedisProcess:
        return RedisProcess(tmp_path)

    async def test_a_dead_tier_is_a_miss_and_is_logged_once_and_comes_back(
        self, server: RedisProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="tq_store")
        blocks = sample_blocks(4)
        clock = Clock()
        try:
            async with store_of(memory(), await redis(server.url), clock=clock) as store:
                await store.put(blocks[:1])
                await store.flush()
                server.kill()
                for _ in range(3):
                    clock.now_s += 10
                    assert await store.get(keys_of(blocks[:2])) == [blocks[0][1], None]
                    assert await store.lookup(keys_of(blocks[:2])) == 1
                    assert await store.put([blocks[2]]) in ([STORED], [PRESENT])
                    await store.flush()
                stats = await store.stats()
                assert set(stats.tiers) == {"memory"}
                assert stats.counters["misses"] == 3
                assert stats.counters["dropped_writes"] == 3
                assert caplog.text.count("the redis tier is failing") == 1
                assert "no longer" not in caplog.text

                server.start()
                async with asyncio.timeout(20):
                    while (await store.stats()).shards["redis"][0].is_open:
                        await asyncio.sleep(0.01)
                clock.now_s += 10
                assert await store.put([blocks[3]]) == [STORED]
                await store.flush()
                assert (await store.stats()).tiers["redis"].num_blocks == 1
                assert caplog.text.count("the redis tier is no longer failing") == 1

                server.kill()
                clock.now_s += 10
                await store.get(keys_of(blocks[1:2]))
                assert caplog.text.count("the redis tier is failing") == 2, "a new outage"
        finally:
            server.kill()

    async def test_a_failing_tier_is_left_alone_for_a_second(self, server: RedisProcess) -> None:
        clock = Clock()
        (key, _), other = sample_blocks(2)
        try:
            async with store_of(memory(), await redis(server.url), clock=clock) as store:
                server.kill()
                await store.get([key])
                for _ in range(10):
                    await store.get([key])
                    await store.contains([key])
                    await store.put([other])
                    await store.flush()
                assert counters(store)["tier_errors_redis"] == 1
                assert counters(store)["dropped_writes"] == 10
                server.start()
                server.command("SET", redis_key(key), "x")
                clock.now_s += 0.9
                assert await store.contains([key]) == [False]
                clock.now_s += 0.2
                assert await store.contains([key]) == [True]
        finally:
            server.kill()

    async def test_removal_tries_even_a_tier_that_is_left_alone(
        self, redis_server: RedisProcess, tmp_path: Path
    ) -> None:
        (key, block), other = sample_blocks(2)
        async with Proxy(redis_server, tmp_path) as proxy:
            bottom = await redis(proxy.url)
            await bottom.put([(key, block), other])
            async with store_of(memory(), bottom) as store:
                proxy.cut_after = 3
                assert await store.get([key]) == [None]
                proxy.cut_after = None
                assert await store.delete([key]) == [True]
                assert await store.purge(NAMESPACE) == 1

    async def test_a_tier_that_is_busy_is_not_left_alone(
        self, redis_server: RedisProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        key, block = sample_block(1)
        patient = await redis(redis_server.url)
        await patient.put([(key, block)])
        await patient.close()
        async with Proxy(redis_server, tmp_path) as proxy:
            bottom = await redis(proxy.url, timeout_s=1.0, lookup_timeout_s=20.0)
            async with store_of(memory(), bottom, clock=Clock()) as store:
                proxy.open_gate.clear()
                lookups = [asyncio.create_task(store.contains([key])) for _ in range(_LOOKUPS)]
                (shard,) = bottom._servers.shards
                while not shard._lookups.locked():
                    await asyncio.sleep(0)
                assert await store.delete([key]) == [False]
                proxy.open_gate.set()
                assert await asyncio.gather(*lookups) == [[True]] * _LOOKUPS
                assert await store.contains([key]) == [True]
                assert counters(store)["tier_errors_redis"] == 1
        assert caplog.text.count("the redis tier is busy") == 1
        assert caplog.text.count("the redis tier is no longer busy") == 1

    async def test_a_purge_that_a_tier_missed_says_so(self, server: RedisProcess, tmp_path: Path) -> None:
        ours, theirs = sample_blocks(2), sample_blocks(2, namespace=OTHER_NAMESPACE)
        try:
            async with store_of(memory(), await redis(server.url), await disk(tmp_path / "disk")) as store:
                await store.put(ours + theirs)
                await store.flush()
                server.kill()
                with pytest.raises(BackendError, match=r"incomplete: the redis tier failed .* purge again"):
                    await store.purge(NAMESPACE)
                assert await store.contains(keys_of(ours + theirs)) == [False] * 2 + [True] * 2
        finally:
            server.kill()

    async def test_of_many_calls_one_tries_a_tier_that_fails(
        self, redis_server: RedisProcess, tmp_path: Path
    ) -> None:
        clock = Clock()
        (key, block), other = sample_blocks(2)
        async with Proxy(redis_server, tmp_path) as proxy:
            bottom = await redis(proxy.url, timeout_s=2.0)
            await bottom.put([(key, block), other])
            async with store_of(memory(), bottom, clock=clock) as store:
                proxy.open_gate.clear()
                assert await store.get([key]) == [None]
                clock.now_s += 2
                proxy.requested.clear()
                attempt = asyncio.create_task(store.get([key]))
                await proxy.requested.wait()
                assert await store.contains([other[0]]) == [False]
                assert not attempt.done(), "who came later did not wait for as long"
                proxy.open_gate.set()
                assert await attempt == [block]
                assert await store.contains([other[0]]) == [True], "from then on the tier is asked again"

    async def test_a_dead_top_tier(self, server: RedisProcess, tmp_path: Path) -> None:
        blocks = sample_blocks(2)
        directory = tmp_path / "disk"
        try:
            async with store_of(await redis(server.url), await disk(directory)) as store:
                server.kill()
                assert await store.put(blocks) == [REFUSED, REFUSED]
                await store.flush()
                assert await store.get(keys_of(blocks)) == bytes_of(blocks), "from below"
                assert await store.delete(keys_of(blocks)) == [True, True]
                assert counters(store)["refused"] == 2
        finally:
            server.kill()

    async def test_a_full_tier_still_answers_and_is_logged_once(
        self, redis_server: RedisProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="tq_store")
        early, *late = sample_blocks(4, 1 << 20)
        top, bottom = memory(), await redis(redis_server.url)
        async with store_of(top, bottom) as store:
            await store.put([early])
            await store.flush()
            redis_server.command("CONFIG", "SET", "maxmemory", "2mb")
            for block in late[:2]:
                assert await store.put([block]) == [STORED]
                await store.flush()
                await top.delete([early[0]])
                assert await store.get([early[0]]) == [early[1]], "reads go on"
            assert counters(store) == {
                **{"dropped_writes": 2, "tier_errors_redis": 2, "hits_redis": 2, "promotions": 2}
            }
            assert caplog.text.count("the redis tier is full") == 1
            redis_server.command("CONFIG", "SET", "maxmemory", "0")
            await store.put([late[2]])
            await store.flush()
            assert await bottom.contains([late[2][0]]) == [True]
            assert caplog.text.count("the redis tier is no longer full") == 1

    async def test_a_stalled_tier_holds_up_nobody_for_longer_than_its_timeout(
        self, redis_server: RedisProcess, tmp_path: Path
    ) -> None:
        (key, block), missing = sample_blocks(2)
        async with Proxy(redis_server, tmp_path) as proxy:
            bottom = await redis(proxy.url, timeout_s=1.0)
            async with store_of(memory(), bottom) as store:
                proxy.open_gate.clear()
                assert await store.put([(key, block)]) == [STORED]
                assert await store.get([key]) == [block], "memory does not wait for redis"
                async with asyncio.timeout(10):
                    assert await store.get([missing[0]]) == [None]
                    await store.flush()
                assert counters(store)["dropped_writes"] == 1
                proxy.open_gate.set()
