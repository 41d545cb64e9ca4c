"""A thousand loads of one prefix at once: each of its blocks is fetched from the lower tier once."""

import asyncio

import grpc.aio
from faults.trial import Trial
from faults.workload import PATIENT, check_log
from store.redis_process import RedisProcess
from store.running_server import wait_until
from store.sample_blocks import bytes_of, keys_of, sample_blocks
from store.server_process import ServerProcess

from tq_store.client import StoreClient
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

LOADS = 1000
_BLOCKS = 16
_PAYLOAD_BYTES = 8 << 10
_CONNECTIONS = 8
_PAUSE_MS = 1000
"""Redis answers nobody for so long, so that all loads are there before the first ends."""


def run(trial: Trial) -> None:
    blocks = sample_blocks(_BLOCKS, _PAYLOAD_BYTES)
    directory = trial.directory / "redis"
    directory.mkdir()
    redis = RedisProcess(directory)
    try:
        with (
            ServerProcess("--redis-url", redis.url) as server,
            StoreClient(server.address, config=PATIENT) as client,
        ):
            client.put(blocks)
            wait_until(lambda: client.stats().tiers["redis"].num_blocks == _BLOCKS)
        _load_from(trial, "redis", ("--redis-url", redis.url, "--redis-timeout", "60s"), blocks, redis)
    finally:
        redis.kill()
    disk = ("--disk-path", trial.directory / "disk", "--disk-budget", "1GiB")
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        client.put(blocks)
        wait_until(lambda: client.stats().tiers["disk"].num_blocks == _BLOCKS)
    _load_from(trial, "disk", disk, blocks, None)


def _load_from(
    trial: Trial, tier: str, options: tuple[object, ...], blocks: list, redis: RedisProcess | None
) -> None:
    """A server with nothing in memory, and everyone asking at once."""
    loads = trial.times(LOADS, least=100)
    with (
        ServerProcess(*options, "--max-concurrent-calls", 2 * LOADS) as server,
        StoreClient(server.address, config=PATIENT) as client,
    ):
        client.ping()
        if redis is not None:
            redis.command("CONFIG", "RESETSTAT")
            redis.command("CLIENT", "PAUSE", str(_PAUSE_MS), "ALL")
        answers = asyncio.run(_load(server.address, blocks, loads))
        trial.result.count("concurrent_loads", loads)
        for answer in answers:
            if answer != bytes_of(blocks):
                trial.result.served_wrong(f"one of {loads} loads at once came with other bytes")
        counters = client.stats().counters
        fetched = counters[f"hits_{tier}"]
        trial.result.expect(
            fetched == _BLOCKS, f"{loads} loads of {_BLOCKS} blocks took {fetched} from {tier}"
        )
        trial.result.expect(counters["misses"] == 0, f"{counters['misses']} of {loads} loads at once missed")
        trial.result.expect(counters["joined_loads"] > 0, "no load joined another")
        if redis is not None:
            found = next(line for line in redis.command("INFO", "stats").split() if "keyspace_hits" in line)
            trial.result.expect(
                found == f"keyspace_hits:{_BLOCKS}", f"Redis was asked more than once: {found}"
            )
        check_log(trial.result, server.log())


async def _load(address: str, blocks: list, loads: int) -> list[list[bytes]]:
    """What each of so many gets at once returned."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CONNECTIONS)]
    request = pb.Keys(keys=keys_of(blocks))

    async def load(channel: grpc.aio.Channel) -> list[bytes]:
        received = [b""] * len(blocks)
        async for frame in stubs.BlockStoreStub(channel).Get(request, timeout=120):
            received[frame.index] += frame.data
        return received

    try:
        return await asyncio.gather(*(load(channels[number % _CONNECTIONS]) for number in range(loads)))
    finally:
        for channel in channels:
            await channel.close()
