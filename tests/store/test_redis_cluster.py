"""The Redis backend on a real cluster: the contract, keys on the move, and a master killed under load."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from store.backend_contract import BackendContract
from store.redis_arrangements import RedisCluster, free_port, running_cluster
from store.redis_outage import Load, keys_on, redis_key
from store.redis_process import RedisProcess
from store.running_server import wait_until
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)

from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.errors import BackendError, BackendUnavailable
from tq_store.results import NamespaceUsage, PutOutcome
from tq_store.tiering.store import TieredStore

pytestmark = pytest.mark.redis

WAIT_S = 30.0
PATIENT = RedisLimits(timeout_s=10.0, lookup_timeout_s=10.0, census_s=None)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), node_timeout_ms=15_000) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    shared_cluster.flush()
    return shared_cluster


@asynccontextmanager
async def opened(url: str, limits: RedisLimits = PATIENT) -> AsyncIterator[RedisBackend]:
    backend = await RedisBackend.open(url, limits=limits)
    try:
        yield backend
    finally:
        await backend.close()


class TestContract(BackendContract):
    @pytest.fixture
    async def backend(self, cluster: RedisCluster) -> AsyncIterator[RedisBackend]:
        async with opened(cluster.url) as backend:
            yield backend


class TestPlacement:
    async def test_a_batch_is_spread_and_each_block_lies_with_the_owner_of_its_slot(
        self, cluster: RedisCluster
    ) -> None:
        blocks = sample_blocks(60)
        async with opened(cluster.url) as backend:
            assert await backend.put(blocks) == [PutOutcome.STORED] * 60
            held = [int(node.command("DBSIZE")) for node in cluster.nodes[:3]]
            assert sum(held) == 60
            assert min(held) >= 8
            for key, block in blocks[:6]:
                owner = cluster.master_of(redis_key(key))
                assert owner.command("STRLEN", redis_key(key)) == str(len(block))

    async def test_one_round_trip_to_each_master_for_the_existence_of_a_whole_prefix(
        self, cluster: RedisCluster
    ) -> None:
        blocks = sample_blocks(128)
        async with opened(cluster.url) as backend:
            await backend.put(blocks[::2])
            sent: list[int] = []
            all_under_way = asyncio.Barrier(3)
            for shard in backend._servers.shards:

                async def exchange(commands: Any, *others: Any, real: Any = shard._exchange) -> Any:
                    sent.append(len(commands))
                    # were one asked after another, this would never end
                    await all_under_way.wait()
                    return await real(commands, *others)

                shard._exchange = exchange  # type: ignore[method-assign]
            assert await backend.contains(keys_of(blocks)) == [number % 2 == 0 for number in range(128)]
        assert len(sent) == 3
        assert sum(sent) == 128

    async def test_quarantined_blocks_stay_in_their_slot(self, cluster: RedisCluster) -> None:
        blocks = sample_blocks(9)
        async with opened(cluster.url) as backend:
            await backend.put(blocks)
            for key, _ in blocks:
                await backend.quarantine(key)
            assert await backend.contains(keys_of(blocks)) == [False] * 9
            for key, block in blocks:
                aside = f"tq:quarantine:1:{{{redis_key(key)}}}"
                assert cluster.master_of(redis_key(key)).command("STRLEN", aside) == str(len(block))
            assert await backend.purge(NAMESPACE) == 0
        assert [node.command("DBSIZE") for node in cluster.nodes[:3]] == ["0"] * 3

    async def test_one_node_of_many_is_enough_to_find_the_others(self, cluster: RedisCluster) -> None:
        for node in (cluster.nodes[0], cluster.nodes[5]):
            async with opened(f"redis+cluster://127.0.0.1:1,127.0.0.1:{node.port}") as backend:
                assert len(backend.shards()) == 3

    async def test_nodes_that_do_not_answer_stop_the_start(self) -> None:
        with pytest.raises(BackendUnavailable, match="no node of the redis cluster tells its slots"):
            await RedisBackend.open("redis+cluster://127.0.0.1:1,127.0.0.1:2")

    async def test_a_node_that_owns_nothing_and_knows_nobody(self, tmp_path: Path) -> None:
        server = RedisProcess(tmp_path, "--cluster-enabled", "yes", port=free_port())
        try:
            with pytest.raises(BackendUnavailable, match="tells its slots: none has any"):
                await RedisBackend.open(f"redis+cluster://127.0.0.1:{server.port}")
        finally:
            server.kill()

    async def test_a_server_that_is_no_cluster(self, tmp_path: Path) -> None:
        server = RedisProcess(tmp_path, port=free_port())
        try:
            with pytest.raises(BackendUnavailable, match="cluster support disabled"):
                await RedisBackend.open(f"redis+cluster://127.0.0.1:{server.port}")
        finally:
            server.kill()


class TestMovingSlots:
    async def test_keys_are_found_while_their_slot_moves_and_after_it_has(
        self, cluster: RedisCluster
    ) -> None:
        key, block = sample_block(1)
        slot = cluster.nodes[0].command("CLUSTER", "KEYSLOT", redis_key(key))
        source = cluster.master_of(redis_key(key))
        target = next(node for node in cluster.nodes[:3] if node is not source)
        source_id, target_id = (node.command("CLUSTER", "MYID") for node in (source, target))
        async with opened(cluster.url) as backend:
            await backend.put([(key, block)])
            target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            assert await backend.get([key]) == [block], "it has not left yet"
            source.command("MIGRATE", "127.0.0.1", str(target.port), redis_key(key), "0", "5000")
            assert await backend.get([key, sample_key(2)]) == [block, None], "asked for on its way"
            assert await backend.contains([key]) == [True]
            for node in cluster.nodes[:3]:
                node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
            assert await backend.get([key]) == [block], "sent on to the new owner"
            async with asyncio.timeout(WAIT_S):
                while backend._servers._topology.owner(redis_key(key).encode()).port != target.port:  # type: ignore[union-attr]
                    await asyncio.sleep(0.01)
            assert await backend.delete([key]) == [True]
            assert [shard.lost_keys for shard in backend.shards()] == [0, 0, 0]
        for node in cluster.nodes[:3]:
            node.command("CLUSTER", "SETSLOT", slot, "NODE", source_id)

    async def test_masters_that_send_a_key_to_each_other_do_not_hold_up_the_call(
        self, cluster: RedisCluster
    ) -> None:
        key = sample_key(1)
        slot = cluster.nodes[0].command("CLUSTER", "KEYSLOT", redis_key(key))
        source = cluster.master_of(redis_key(key))
        target = next(node for node in cluster.nodes[:3] if node is not source)
        source_id, target_id = (node.command("CLUSTER", "MYID") for node in (source, target))
        async with opened(cluster.url) as backend:
            source.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
            try:
                assert await backend.get([key]) == [None]
                assert await backend.put([sample_block(1)]) == [PutOutcome.REFUSED]
            finally:
                source.command("CLUSTER", "SETSLOT", slot, "NODE", source_id)
            (gone,) = [shard for shard in backend.shards() if shard.name == "gone"]
            assert (gone.failed_calls, gone.lost_keys) == (0, 2)

    async def test_a_slot_without_an_owner_costs_its_own_keys_only(self, cluster: RedisCluster) -> None:
        blocks = sample_blocks(30)
        key = blocks[7][0]
        slot = cluster.nodes[0].command("CLUSTER", "KEYSLOT", redis_key(key))
        source = cluster.master_of(redis_key(key))
        for node in (source, *cluster.nodes):
            node.command("CLUSTER", "DELSLOTS", slot)
        try:
            async with opened(cluster.url) as backend:
                outcomes = [PutOutcome.STORED] * 30
                outcomes[7] = PutOutcome.REFUSED
                assert await backend.put(blocks) == outcomes
                found: list[bytes | None] = list(bytes_of(blocks))
                found[7] = None
                assert await backend.get(keys_of(blocks)) == found
                await backend.quarantine(key)
                with pytest.raises(BackendUnavailable, match="no server of the redis cluster owns"):
                    await backend.delete([key])
                (gone,) = [shard for shard in backend.shards() if shard.name == "gone"]
                assert (gone.failed_calls, gone.lost_keys) == (0, 3)
        finally:
            source.command("CLUSTER", "ADDSLOTS", slot)
            assigned = "cluster_slots_assigned:16384"
            for node in cluster.nodes:
                await asyncio.to_thread(
                    wait_until, lambda node=node: assigned in node.command("CLUSTER", "INFO")
                )

    async def test_the_watch_outlives_what_nobody_expected(
        self, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with opened(cluster.url) as backend:
            servers = backend._servers
            calls: list[int] = []

            async def refresh() -> None:
                calls.append(1)
                raise ValueError("a reply that makes no sense")

            monkeypatch.setattr(servers._topology, "refresh", refresh)
            async with asyncio.timeout(WAIT_S):
                while len(calls) < 2:
                    servers._trouble.set()
                    await asyncio.sleep(0.01)
        assert "the redis tier's watch met something unexpected" in caplog.text


class TestCensus:
    async def test_blocks_and_bytes_by_namespace_over_all_masters(self, cluster: RedisCluster) -> None:
        ours, theirs = sample_blocks(20, 1000), sample_blocks(7, 500, namespace=OTHER_NAMESPACE)
        async with opened(cluster.url) as backend:
            await backend.put(ours + theirs)
            await backend._census.take(backend._servers.shards, timeout_s=10.0)
            assert (await backend.stats()).namespaces == {
                NAMESPACE.hex(): NamespaceUsage(num_blocks=20, used_bytes=20 * 1256),
                OTHER_NAMESPACE.hex(): NamespaceUsage(num_blocks=7, used_bytes=7 * 756),
            }


class TestAMasterIsKilled:
    # a dead server refuses at once; the time is for those that live on a busy machine
    LIMITS = RedisLimits(timeout_s=5.0, lookup_timeout_s=5.0, census_s=None)

    async def test_under_load_its_keys_are_misses_until_the_failover_and_nothing_else_is(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Four callers read and write through a store with no room in memory; then `kill -9` of a master."""
        caplog.set_level(logging.INFO, logger="tq_store")
        with running_cluster(tmp_path, node_timeout_ms=2500) as cluster:
            blocks = sample_blocks(150, 4000)
            victim = cluster.nodes[1]
            lost = keys_on(cluster, 1, keys_of(blocks))
            backend = await RedisBackend.open(cluster.url, limits=self.LIMITS)
            store = TieredStore([MemoryBackend(budget_bytes=5000), backend])
            try:
                assert await backend.put(blocks) == [PutOutcome.STORED] * 150
                cluster.wait_for_replicas()
                load = Load(store, blocks)
                callers = [asyncio.create_task(load.run(seed)) for seed in range(4)]
                await load.rounds(20)
                assert load.missed == set()

                await asyncio.to_thread(victim.kill)
                # from the first miss on the outage is seen, and calls go on
                await load.until(lambda: bool(load.missed))
                started = time.monotonic()
                await load.rounds(20)
                assert load.missed <= lost, "the other masters' keys are served all the time"
                assert "left alone until it answers a probe" in caplog.text

                await load.until(lambda: load.found_since(started) >= {key for key, _ in blocks})
                assert load.missed <= lost
                load.stop = True
                await asyncio.gather(*callers)
                assert await backend.get(keys_of(blocks)) == bytes_of(blocks), "all are served again"
                assert load.wrong == 0
                assert len(load.stored) > 40
                await store.flush()
                found = dict(zip(load.stored, await backend.get(load.stored), strict=True))
                written = {key: block for key, block in load.fresh.items() if found[key] is not None}
                assert all(found[key] == block for key, block in written.items())
                assert len(written) > 0
                (gone,) = [shard for shard in backend.shards() if shard.name == "gone"]
                assert gone.failed_calls >= 3
                assert gone.lost_keys > 0
                assert not any(shard.is_open for shard in backend.shards())
                assert (await store.stats()).counters["tier_errors_redis"] == 0
            finally:
                await store.close()

    async def test_a_stalled_master_costs_the_others_nothing_once_its_breaker_is_open(
        self, cluster: RedisCluster
    ) -> None:
        """SIGSTOP, for a shorter time than the cluster waits before a failover."""
        blocks = sample_blocks(90)
        victim = cluster.nodes[2]
        lost = keys_on(cluster, 2, keys_of(blocks))
        limits = RedisLimits(timeout_s=2.0, lookup_timeout_s=2.0, census_s=None)
        async with opened(cluster.url, limits) as backend:
            await backend.put(blocks)
            victim.pause()
            try:
                answers = await asyncio.gather(*(backend.contains(keys_of(blocks)) for _ in range(4)))
                expected = [key not in lost for key, _ in blocks]
                assert answers == [expected] * 4
                (stalled,) = [shard for shard in backend.shards() if shard.is_open]
                assert stalled.name == f"127.0.0.1:{victim.port}"
                assert stalled.failed_calls >= 3
                before = stalled.lost_keys
                assert await backend.contains(keys_of(blocks)) == expected
                assert await backend.put([sample_block(1)]) in ([PutOutcome.PRESENT], [PutOutcome.REFUSED])
                with pytest.raises(BackendError, match="left alone"):
                    await backend.delete([next(iter(lost))])
                with pytest.raises(BackendError, match="left alone"):
                    await backend.purge(NAMESPACE)
                (stalled,) = [shard for shard in backend.shards() if shard.is_open]
                assert stalled.lost_keys >= before + len(lost)
            finally:
                victim.resume()
            async with asyncio.timeout(WAIT_S):
                while any(shard.is_open for shard in backend.shards()):
                    await asyncio.sleep(0.01)
            found = await backend.get(keys_of(blocks))
            assert {key for key, block in zip(keys_of(blocks), found, strict=True) if block} == lost
