"""The Redis backend behind real sentinels: it finds the master, and follows when another takes over."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from store.redis_arrangements import WatchedMaster, running_sentinels
from store.running_server import wait_until
from store.sample_blocks import bytes_of, keys_of, sample_block, sample_blocks

from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.errors import BackendUnavailable
from tq_store.results import PutOutcome
from tq_store.tiering.store import TieredStore

pytestmark = pytest.mark.redis

WAIT_S = 30.0
LIMITS = RedisLimits(timeout_s=2.0, lookup_timeout_s=1.0, census_s=None)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedMaster]:
    """Its first master is dead once the failover was tested; the sentinels do not care."""
    with running_sentinels(tmp_path_factory.mktemp("sentinels")) as arrangement:
        yield arrangement


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "sentinel-password"
    path.write_text(WatchedMaster.SENTINEL_PASSWORD)
    path.chmod(0o600)
    return path


async def test_a_failover_is_followed_and_nothing_raises_meanwhile(
    watched: WatchedMaster, password_file: Path
) -> None:
    blocks = sample_blocks(40, 2000)
    backend = await RedisBackend.open(watched.url, limits=LIMITS, sentinel_password_file=password_file)
    # no room in memory for more than one block: what is got comes from Redis
    store = TieredStore([MemoryBackend(budget_bytes=3000), backend])
    try:
        assert await backend.put(blocks) == [PutOutcome.STORED] * 40
        assert [shard.name for shard in backend.shards()] == [f"127.0.0.1:{watched.master.port}"]
        copied = str(len(blocks))
        word = ("-a", watched.PASSWORD)
        await asyncio.to_thread(wait_until, lambda: watched.replica.command(*word, "DBSIZE") == copied)
        watched.master.kill()

        num_rounds, num_misses = 0, 0
        async with asyncio.timeout(WAIT_S):
            while True:
                found = await store.get(keys_of(blocks))
                assert all(got in (None, block) for got, block in zip(found, bytes_of(blocks), strict=True))
                assert await store.lookup(keys_of(blocks)) in range(41)
                num_rounds += 1
                num_misses += found.count(None)
                if num_misses and None not in found:
                    break
                await asyncio.sleep(0.01)
        assert num_misses >= 39, "a master that is dead has no hits"
        assert num_rounds > 5
        names = [shard.name for shard in backend.shards()]
        assert names == [f"127.0.0.1:{watched.replica.port}", "gone"]
        assert await backend.put([sample_block(99)]) == [PutOutcome.STORED], "the new master takes writes"
    finally:
        await store.close()


async def test_the_sentinels_want_their_own_password(watched: WatchedMaster) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"called 'blocks' that works: sentinel at .* does not work: Auth"
    ) as caught:
        await RedisBackend.open(watched.url, limits=LIMITS)
    assert watched.PASSWORD not in str(caught.value)


async def test_a_service_that_nobody_watches(watched: WatchedMaster, password_file: Path) -> None:
    url = watched.url.replace(f"/{watched.SERVICE}", "/another")
    with pytest.raises(BackendUnavailable, match=r"no sentinel names a master called 'another' that works$"):
        await RedisBackend.open(url, limits=LIMITS, sentinel_password_file=password_file)


async def test_no_sentinel_answers() -> None:
    with pytest.raises(BackendUnavailable, match=r"sentinel at 127\.0\.0\.1:1 does not work: Error"):
        await RedisBackend.open("redis+sentinel://127.0.0.1:1/s", limits=LIMITS)
