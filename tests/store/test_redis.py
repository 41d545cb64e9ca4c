"""The Redis backend against a real server: the contract, its keys, its round trips, and failing sockets."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from store.backend_contract import BackendContract
from store.redis_process import Proxy, RedisProcess
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)

from tq_store.backends import redis_census
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.backends.redis_shard import _end_of_round_trip
from tq_store.errors import BackendError, BackendFull, BackendTimeout, BackendUnavailable, ConfigError
from tq_store.keys import BlockKey
from tq_store.results import NamespaceUsage, PutOutcome

pytestmark = pytest.mark.redis

WAIT_S = 20.0
SLACK_S = 3.0
"""What a busy machine may add to a deadline."""


@asynccontextmanager
async def opened(
    url: str, timeout_s: float = 10.0, ttl_s: float | None = None
) -> AsyncIterator[RedisBackend]:
    limits = RedisLimits(timeout_s=timeout_s, lookup_timeout_s=timeout_s, ttl_s=ttl_s, census_s=None)
    backend = await RedisBackend.open(url, limits=limits)
    try:
        yield backend
    finally:
        await backend.close()


def redis_key(key: BlockKey) -> str:
    return f"tq:1:{key[:32].hex()}:{key[32:].hex()}"


def aside(key: BlockKey) -> str:
    return f"tq:quarantine:1:{{{redis_key(key)}}}"


async def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what the backend's own task brings about."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.01)


class TestContract(BackendContract):
    @pytest.fixture
    async def backend(self, redis_server: RedisProcess) -> AsyncIterator[RedisBackend]:
        async with opened(redis_server.url) as backend:
            yield backend


class TestKeys:
    async def test_one_key_per_block_holds_the_whole_block(self, redis_server: RedisProcess) -> None:
        key, block = sample_block(1)
        async with opened(redis_server.url) as backend:
            await backend.put([(key, block)])
        assert redis_server.command("KEYS", "*") == redis_key(key)
        assert redis_server.command("STRLEN", redis_key(key)) == str(len(block))
        assert redis_server.command("TTL", redis_key(key)) == "-1"

    async def test_time_to_live(self, redis_server: RedisProcess) -> None:
        key, block = sample_block(1)
        async with opened(redis_server.url, ttl_s=500) as backend:
            await backend.put([(key, block)])
        assert 0 < int(redis_server.command("TTL", redis_key(key))) <= 500

    async def test_a_get_gives_a_block_its_whole_lifetime_again_and_a_lookup_does_not(
        self, redis_server: RedisProcess
    ) -> None:
        key, block = sample_block(1)
        async with opened(redis_server.url, ttl_s=500) as backend:
            await backend.put([(key, block)])
            redis_server.command("EXPIRE", redis_key(key), "60")
            assert await backend.contains([key]) == [True]
            assert int(redis_server.command("TTL", redis_key(key))) <= 60
            assert await backend.get([key, sample_key(2)]) == [block, None]
            assert 490 < int(redis_server.command("TTL", redis_key(key))) <= 500
            redis_server.command("PEXPIRE", redis_key(key), "1")
            await eventually(lambda: redis_server.command("DBSIZE") == "0")
            assert await backend.get([key]) == [None]

    async def test_quarantined_blocks_are_kept_for_a_day(self, redis_server: RedisProcess) -> None:
        key, block = sample_block(1)
        async with opened(redis_server.url) as backend:
            await backend.put([(key, block)])
            await backend.quarantine(key)
        assert redis_server.command("KEYS", "*") == aside(key)
        assert redis_server.command("STRLEN", aside(key)) == str(len(block))
        assert 86_000 < int(redis_server.command("TTL", aside(key))) <= 86_400

    async def test_purge_takes_only_what_is_ours(self, redis_server: RedisProcess) -> None:
        ours, theirs = sample_blocks(3), sample_blocks(3, namespace=OTHER_NAMESPACE)
        redis_server.command("SET", "session:42", "someone else's")
        async with opened(redis_server.url) as backend:
            await backend.put(ours + theirs)
            await backend.quarantine(ours[0][0])
            await backend.quarantine(theirs[0][0])
            assert await backend.purge(NAMESPACE) == 2, "quarantined blocks go, but do not count"
            left = redis_server.command("KEYS", "*").splitlines()
            assert sorted(left) == sorted(
                ["session:42", aside(theirs[0][0])] + [redis_key(key) for key, _ in theirs[1:]]
            )
            assert await backend.purge() == 2
        assert redis_server.command("KEYS", "*") == "session:42"

    async def test_purge_of_many_pages(self, redis_server: RedisProcess) -> None:
        async with opened(redis_server.url) as backend:
            await backend.put(sample_blocks(3500))
            assert await backend.purge(NAMESPACE) == 3500
        statistics = redis_server.command("INFO", "commandstats")
        assert int(re.search(r"cmdstat_scan:calls=(\d+)", statistics)[1]) > 3, "page by page"
        assert not re.search(r"cmdstat_(keys|flushdb)\b", statistics)

    async def test_a_value_of_another_type_is_a_miss(self, redis_server: RedisProcess) -> None:
        redis_server.command("RPUSH", redis_key(sample_key(1)), "a list")
        async with opened(redis_server.url) as backend:
            assert await backend.get([sample_key(1)]) == [None]


class TestCensus:
    async def test_the_first_count_is_taken_at_once_and_purged_namespaces_go(
        self, redis_server: RedisProcess
    ) -> None:
        redis_server.command("SET", "session:42", "someone else's")
        redis_server.command("RPUSH", redis_key(sample_key(99)), "a list")
        redis_server.command("SET", "tq:1:not-a-digest:x", "someone else's too")
        async with opened(redis_server.url) as backend:
            await backend.put(sample_blocks(5, 1000) + sample_blocks(2, 500, namespace=OTHER_NAMESPACE))
            assert (await backend.stats()).namespaces == {}, "not asked to count"
        ours, theirs = (
            NamespaceUsage(num_blocks=5, used_bytes=5 * 1256),
            NamespaceUsage(num_blocks=2, used_bytes=2 * 756),
        )
        backend = await RedisBackend.open(redis_server.url)
        try:
            await eventually(lambda: bool(backend._census.namespaces))
            counted = (await backend.stats()).namespaces
            assert counted == {NAMESPACE.hex(): ours, OTHER_NAMESPACE.hex(): theirs}
            await backend.purge(NAMESPACE)
            assert (await backend.stats()).namespaces == {OTHER_NAMESPACE.hex(): theirs}
            await backend.purge()
            assert (await backend.stats()).namespaces == {}
        finally:
            await backend.close()

    async def test_many_keys_are_counted_a_step_at_a_time(
        self, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_census, "_STEP_PAUSE_S", 0.0)
        async with opened(redis_server.url) as backend:
            await backend.put(sample_blocks(2500))
            redis_server.command("CONFIG", "RESETSTAT")
            await backend._census.take(backend._servers.shards, timeout_s=WAIT_S)
            assert backend._census.namespaces[NAMESPACE.hex()].num_blocks == 2500
        statistics = redis_server.command("INFO", "commandstats")
        assert int(re.search(r"cmdstat_scan:calls=(\d+)", statistics)[1]) >= 4
        assert int(re.search(r"cmdstat_strlen:calls=(\d+)", statistics)[1]) == 2500

    async def test_a_server_that_fails_keeps_its_last_count(self, tmp_path: Path) -> None:
        server = RedisProcess(tmp_path)
        try:
            async with opened(server.url) as backend:
                await backend.put(sample_blocks(3))
                shards = backend._servers.shards
                await backend._census.take(shards, timeout_s=WAIT_S)
                server.kill()
                await backend._census.take(shards, timeout_s=WAIT_S)
                assert backend._census.namespaces[NAMESPACE.hex()].num_blocks == 3
                await backend._census.take([], timeout_s=WAIT_S)
                assert backend._census.namespaces == {}, "a server that owns keys no more"
        finally:
            server.kill()


class TestMemoryLimit:
    async def test_a_server_that_may_not_evict_is_full(self, redis_server: RedisProcess) -> None:
        first, *rest = sample_blocks(8, 1 << 20)
        async with opened(redis_server.url) as backend:
            await backend.put([first])
            redis_server.command("CONFIG", "SET", "maxmemory", "3mb")
            with pytest.raises(BackendFull, match="is full: raise its maxmemory or set maxmemory-policy"):
                await backend.put(rest)
            assert await backend.get([first[0]]) == [first[1]]

    async def test_a_server_that_may_evict_keeps_its_own_budget(self, redis_server: RedisProcess) -> None:
        redis_server.command("CONFIG", "SET", "maxmemory", "6mb", "maxmemory-policy", "allkeys-lru")
        blocks = sample_blocks(20, 1 << 20)
        async with opened(redis_server.url) as backend:
            for block in blocks:
                await backend.put([block])
            found = await backend.get(keys_of(blocks))
            assert all(got in (None, block) for got, block in zip(found, bytes_of(blocks), strict=True))
            assert found[-1] is not None
            stats = await backend.stats()
        assert stats.budget_bytes == 6 << 20
        assert stats.evicted_blocks >= found.count(None) > 0, "replies take memory too, so more may go"

    async def test_settings_that_will_hurt_are_said_at_the_start(
        self, redis_server: RedisProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with opened(redis_server.url):
            assert "maxmemory is 0, so it grows" in caplog.text
            assert "maxmemory-policy is noeviction" in caplog.text
        caplog.clear()
        redis_server.command("CONFIG", "SET", "maxmemory", "64mb", "maxmemory-policy", "volatile-lfu")
        async with opened(redis_server.url):
            assert "maxmemory-policy is volatile-lfu, which evicts only what expires" in caplog.text
        caplog.clear()
        async with opened(redis_server.url, ttl_s=60):
            assert caplog.text == ""

    async def test_without_a_limit_there_is_no_budget(self, redis_server: RedisProcess) -> None:
        async with opened(redis_server.url) as backend:
            assert (await backend.stats()).budget_bytes is None


class TestRoundTrips:
    @pytest.fixture
    async def proxy(self, redis_server: RedisProcess, tmp_path: Path) -> AsyncIterator[Proxy]:
        async with Proxy(redis_server, tmp_path) as proxy:
            yield proxy

    async def test_one_for_the_existence_of_a_whole_prefix(self, proxy: Proxy) -> None:
        blocks = sample_blocks(200)
        async with opened(proxy.url) as backend:
            await backend.put(blocks[:100])
            # if the client waited for any reply before its last request, this would never end
            proxy.bursts.clear()
            proxy.open_gate.clear()
            lookup = asyncio.create_task(backend.contains(keys_of(blocks)))
            while sum(request.count(b"EXISTS") for request in proxy.requests()) < 200:
                proxy.requested.clear()
                await proxy.requested.wait()
            assert not lookup.done()
            proxy.open_gate.set()
            assert await lookup == [True] * 100 + [False] * 100
        assert len(proxy.requests()) == 1

    async def test_puts_of_bounded_bytes(self, proxy: Proxy) -> None:
        blocks = [*sample_blocks(5, 6 << 20), sample_block(5, 20 << 20)]
        async with opened(proxy.url) as backend:
            proxy.bursts.clear()
            proxy.open_gate.clear()
            put = asyncio.create_task(backend.put(blocks))
            while sum(map(len, proxy.requests())) < 12 << 20:
                proxy.requested.clear()
                await proxy.requested.wait()
            # two blocks have passed; the third waits for their replies
            assert [len(request) >> 20 for request in proxy.requests()] == [12]
            proxy.open_gate.set()
            assert await put == [PutOutcome.STORED] * 6

    @pytest.mark.parametrize(
        ("mebibytes", "trips"),
        [
            ([], []),
            ([6, 6, 6, 6, 6], [[6, 6], [6, 6], [6]]),
            ([8, 8, 1], [[8, 8], [1]]),
            ([1, 20, 1], [[1], [20], [1]]),
        ],
    )
    def test_batches_are_cut_at_16_mebibytes(self, mebibytes: list[int], trips: list[list[int]]) -> None:
        blocks = [(sample_key(number), bytes(size << 20)) for number, size in enumerate(mebibytes)]
        commands = [(b"SET", *block, b"NX") for block in blocks]
        ends = [0]
        while ends[-1] < len(commands):
            ends.append(_end_of_round_trip(commands, ends[-1], 0))
        groups = [commands[start:end] for start, end in pairwise(ends)]
        assert [[len(command[2]) >> 20 for command in group] for group in groups] == trips

    async def test_gets_of_bounded_bytes(self, proxy: Proxy) -> None:
        blocks = sample_blocks(9, 6 << 20)
        async with opened(proxy.url) as backend:
            await backend.put(blocks)
            await backend.get(keys_of(blocks[:1]))
            proxy.bursts.clear()
            found = await backend.get(keys_of(blocks))
        assert [got == block for got, block in zip(found, bytes_of(blocks), strict=True)] == [True] * 9
        assert [len(reply) >> 20 for reply in proxy.replies()] == [12, 12, 12, 12, 6]

    async def test_gets_of_small_blocks_share_round_trips(self, proxy: Proxy) -> None:
        blocks = sample_blocks(500)
        async with opened(proxy.url) as backend:
            await backend.put(blocks)
            proxy.bursts.clear()
            assert await backend.get(keys_of(blocks)) == bytes_of(blocks)
        assert len(proxy.requests()) <= 2

    async def test_a_call_that_is_cancelled_takes_its_reply_with_it(self, proxy: Proxy) -> None:
        wanted, other = sample_blocks(2)
        async with opened(proxy.url) as backend:
            await backend.put([wanted, other])
            proxy.open_gate.clear()
            proxy.requested.clear()
            abandoned = asyncio.create_task(backend.get([other[0]]))
            await proxy.requested.wait()
            abandoned.cancel()
            await asyncio.wait([abandoned])
            proxy.open_gate.set()
            for _ in range(20):
                assert await backend.get([wanted[0]]) == [wanted[1]]

    async def test_a_connection_cut_in_the_middle_of_a_reply(self, proxy: Proxy) -> None:
        key, block = sample_block(1, 500_000)
        async with opened(proxy.url) as backend:
            await backend.put([(key, block)])
            proxy.cut_after = 1000
            with pytest.raises(BackendUnavailable, match=r"redis at .*proxy\.sock does not work: "):
                await backend.get([key])
            proxy.cut_after = None
            assert await backend.get([key]) == [block], "works again at once"

    async def test_a_server_that_stalls_later(self, proxy: Proxy) -> None:
        key, block = sample_block(1)
        async with opened(proxy.url, timeout_s=1.0) as backend:
            proxy.open_gate.clear()
            start = time.monotonic()
            errors = await asyncio.gather(
                backend.contains([key]),
                backend.get([key]),
                backend.put([(key, block)]),
                backend.delete([key]),
                backend.quarantine(key),
                backend.purge(),
                backend.stats(),
                return_exceptions=True,
            )
            assert time.monotonic() - start < 1.0 + SLACK_S
            assert [type(error) for error in errors] == [BackendTimeout] * 7
            assert all("did not answer within 1.0 s" in str(error) for error in errors)
            assert [shard.is_open for shard in backend.shards()] == [True]
            with pytest.raises(BackendUnavailable, match="failed too often and is left alone for now"):
                await backend.contains([key])
            proxy.open_gate.set()
            await eventually(lambda: not backend.shards()[0].is_open)
            assert await backend.contains([sample_key(2)]) == [False]

    async def test_a_server_that_is_let_go_ends_what_is_under_way_and_keeps_no_connection(
        self, proxy: Proxy
    ) -> None:
        blocks = sample_blocks(2)
        async with opened(proxy.url) as backend:
            await backend.put(blocks)
            (shard,) = backend._servers.shards
            proxy.open_gate.clear()
            proxy.requested.clear()
            under_way = asyncio.create_task(backend.get(keys_of(blocks)))
            await proxy.requested.wait()
            await shard.retire()
            proxy.open_gate.set()
            assert await under_way == bytes_of(blocks)
            pool = shard._link.pool
            assert not any(connection.is_connected for connection in pool._available_connections)

    async def test_a_slow_link_is_no_dead_server(self, proxy: Proxy) -> None:
        blocks = sample_blocks(8, 1 << 20)
        async with opened(proxy.url, timeout_s=2.0) as backend:
            await backend.put(blocks)
            proxy.pause_s = 0.02
            start = time.monotonic()
            found = await backend.get(keys_of(blocks))
            assert time.monotonic() - start > 2.0, "longer than any silence may last"
            assert [got == block for got, block in zip(found, bytes_of(blocks), strict=True)] == [True] * 8

    async def test_a_busy_server_is_no_dead_server_either(self, redis_server: RedisProcess) -> None:
        blocks = sample_blocks(3)
        async with opened(redis_server.url, timeout_s=0.5) as backend:
            await backend.put(blocks[:2])
            (shard,) = backend._servers.shards
            for _ in range(16):
                await shard._transfers.acquire()
            assert await backend.contains(keys_of(blocks)) == [True, True, False], (
                "lookups have turns of their own"
            )
            assert await backend.get(keys_of(blocks)) == [None] * 3
            assert await backend.put(blocks[2:]) == [PutOutcome.REFUSED]
            for _ in range(16):
                shard._transfers.release()
            assert await backend.get(keys_of(blocks)) == [*bytes_of(blocks[:2]), None]
            (stats,) = backend.shards()
            assert (stats.failed_calls, stats.lost_keys, stats.is_open) == (0, 4, False)

    async def test_more_callers_than_connections(self, proxy: Proxy) -> None:
        blocks = sample_blocks(100)
        async with opened(proxy.url) as backend:
            await backend.put(blocks)
            found = await asyncio.gather(*(backend.get([key]) for key in keys_of(blocks)))
            assert found == [[block] for block in bytes_of(blocks)]


class TestOutages:
    async def test_nobody_listens(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        with pytest.raises(BackendUnavailable, match=f"redis at 127.0.0.1:{port} does not work"):
            await RedisBackend.open(f"redis://127.0.0.1:{port}")

    async def test_a_server_that_accepts_and_never_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
            start = time.monotonic()
            with pytest.raises(BackendTimeout, match=r"did not answer within 0\.2 s"):
                await RedisBackend.open(url, limits=RedisLimits(timeout_s=0.2))
            assert time.monotonic() - start < 0.2 + SLACK_S

    async def test_a_restarted_server_is_found_again(self, tmp_path: Path) -> None:
        server = RedisProcess(tmp_path)
        block = sample_block(1)
        try:
            async with opened(server.url) as backend:
                await backend.put([block])
                server.kill()
                with pytest.raises(BackendUnavailable):
                    await backend.get([block[0]])
                server.start()
                assert await backend.get([block[0]]) == [None]
                assert await backend.put([block]) == [PutOutcome.STORED]
        finally:
            server.kill()

    async def test_a_read_only_replica(self, redis_server: RedisProcess) -> None:
        key, block = sample_block(1)
        async with opened(redis_server.url) as backend:
            await backend.put([(key, block)])
            redis_server.command("REPLICAOF", "127.0.0.1", "1")
            try:
                for call in (lambda: backend.put([sample_block(2)]), lambda: backend.quarantine(key)):
                    with pytest.raises(BackendUnavailable, match="read only replica"):
                        await call()
            finally:
                redis_server.command("REPLICAOF", "NO", "ONE")


class TestCredentials:
    PASSWORD = "hunter2#/secret"
    QUOTED = "hunter2%23%2Fsecret"

    @pytest.fixture
    def guarded_server(self, tmp_path: Path) -> Iterator[RedisProcess]:
        server = RedisProcess(tmp_path, "--requirepass", self.PASSWORD)
        yield server
        server.kill()

    async def assert_keeps_the_secret(self, url: str, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match) as caught:
            await RedisBackend.open(url)
        shown: BaseException | None = caught.value
        while shown is not None:
            assert "hunter2" not in str(shown)
            shown = shown.__cause__

    async def test_the_right_password(self, guarded_server: RedisProcess) -> None:
        async with opened(f"unix://:{self.QUOTED}@{guarded_server.socket}") as backend:
            assert await backend.put([sample_block(1)]) == [PutOutcome.STORED]
            assert "hunter2" not in repr(backend)

    async def test_a_wrong_password(self, guarded_server: RedisProcess) -> None:
        url = f"unix://:hunter2wrong@{guarded_server.socket}"
        await self.assert_keeps_the_secret(
            url, BackendUnavailable, "does not work: invalid username-password"
        )

    async def test_no_password(self, guarded_server: RedisProcess) -> None:
        with pytest.raises(BackendUnavailable, match="Authentication required"):
            await RedisBackend.open(guarded_server.url)

    async def test_a_server_that_repeats_what_it_did_not_understand(self) -> None:
        async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"secret\r\n")
            writer.write(b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2#/secret'\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(repeat, "127.0.0.1", 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            url = f"redis://:{self.QUOTED}@127.0.0.1:{port}"
            await self.assert_keeps_the_secret(url, BackendError, r"args beginning with: '\*\*\*'")

    @pytest.mark.parametrize(
        "url",
        [
            "redis://:hunter2/7@host:6379",
            "http://:hunter2@host",
            "",
            "redis://:hunter2@host:port",
            "redis://:hunter2@host?socket_timeout=hunter2",
        ],
    )
    async def test_a_url_that_makes_no_sense(self, url: str) -> None:
        await self.assert_keeps_the_secret(url, ConfigError, "the URL of the redis tier must read redis://")

    @pytest.mark.parametrize(("timeout_s", "ttl_s"), [(0, None), (-1.0, None), (1.0, 0)])
    def test_numbers_that_make_no_sense(self, timeout_s: float, ttl_s: float | None) -> None:
        with pytest.raises(ConfigError, match=r"timeouts above 0 and a time to live of at least 1 s"):
            RedisLimits(timeout_s=timeout_s, ttl_s=ttl_s)
