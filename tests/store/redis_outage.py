"""Callers on a real cluster one of whose masters is killed or stalls: what they get, and how long they wait.

::

    PYTHONPATH=.:tests python -m store.redis_outage --how kill --node-timeout 5000

prints one line of JSON: when the first and the last miss was, counted from the blow, how many there were, how
many of keys of other masters, how many wrong blocks, and how long calls took before and meanwhile.
"""

import argparse
import asyncio
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from store.redis_arrangements import RedisCluster, running_cluster
from store.sample_blocks import keys_of, sample_block, sample_blocks

from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.tiering.store import TieredStore

WAIT_S = 60.0


def redis_key(key: BlockKey) -> str:
    return f"tq:1:{key[:32].hex()}:{key[32:].hex()}"


def keys_on(cluster: RedisCluster, number: int, keys: list[BlockKey]) -> set[BlockKey]:
    """Those that the master of that number owned when the cluster was made."""
    return {key for key in keys if cluster.master_of(redis_key(key)) is cluster.nodes[number]}


class Load:
    """Callers that get known blocks and put new ones, and what became of it."""

    def __init__(self, store: TieredStore, blocks: list[tuple[BlockKey, bytes]]) -> None:
        self._store = store
        self._blocks = blocks
        self._fresh_numbers = itertools.count(10_000)
        self._found_at: dict[BlockKey, float] = {}
        self._num_rounds = 0
        self.fresh: dict[BlockKey, bytes] = {}
        self.stored: list[BlockKey] = []
        self.missed: set[BlockKey] = set()
        self.missed_at: list[float] = []
        self.took_s: list[tuple[float, float]] = []
        self.wrong = 0
        self.stop = False

    async def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop:
            asked = chance.sample(self._blocks, 12)
            began = time.monotonic()
            answer = await self._store.get(keys_of(asked))
            ended = time.monotonic()
            self.took_s.append((began, ended - began))
            for (key, block), found in zip(asked, answer, strict=True):
                if found is None:
                    self.missed.add(key)
                    self.missed_at.append(ended)
                else:
                    self.wrong += found != block
                    self._found_at[key] = ended
            await self._store.lookup(keys_of(asked))
            key, block = sample_block(next(self._fresh_numbers), 500)
            self.fresh[key] = block
            if await self._store.put([(key, block)]) == [PutOutcome.STORED]:
                self.stored.append(key)
            self._num_rounds += 1

    def found_since(self, moment: float) -> set[BlockKey]:
        return {key for key, found_at in self._found_at.items() if found_at > moment}

    async def rounds(self, count: int) -> None:
        target = self._num_rounds + count
        await self.until(lambda: self._num_rounds >= target)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.01)


def _times(took_s: list[float]) -> dict[str, float]:
    ordered = sorted(took_s)
    shares = {"p50": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "max": len(ordered) - 1}
    return {f"{name}_ms": round(ordered[place] * 1000, 1) for name, place in shares.items()}


async def measure(cluster: RedisCluster, how: str) -> dict[str, object]:
    blocks = sample_blocks(300, 64 << 10)
    keys, victim = keys_of(blocks), cluster.nodes[1]
    lost = keys_on(cluster, 1, keys)
    backend = await RedisBackend.open(cluster.url, limits=RedisLimits(census_s=None))
    # with next to no room in memory, blocks come from Redis
    store = TieredStore([MemoryBackend(budget_bytes=5000), backend])
    try:
        await backend.put(blocks)
        cluster.wait_for_replicas()
        load = Load(store, blocks)
        callers = [asyncio.create_task(load.run(seed)) for seed in range(8)]
        await load.rounds(400)
        blow = time.monotonic()
        victim.kill() if how == "kill" else victim.pause()
        await load.until(lambda: bool(load.missed))
        await load.until(
            lambda: (
                time.monotonic() > load.missed_at[-1] + 1
                and load.found_since(load.missed_at[-1]) == set(keys)
            )
        )
        load.stop = True
        await asyncio.gather(*callers)
    finally:
        await store.close()
        victim.resume()
    last_miss = load.missed_at[-1]
    return {
        "first_miss_s": round(load.missed_at[0] - blow, 2),
        "last_miss_s": round(last_miss - blow, 2),
        "misses": len(load.missed_at),
        "foreign_misses": len(load.missed - lost),
        "wrong": load.wrong,
        "before": _times([took for began, took in load.took_s if began + took < blow]),
        "meanwhile": _times([took for began, took in load.took_s if blow <= began <= last_miss]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the outage of one master of three costs.")
    parser.add_argument("--how", choices=("kill", "stall"), default="kill")
    parser.add_argument("--node-timeout", type=int, default=5000, metavar="MS")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        running_cluster(Path(directory), node_timeout_ms=options.node_timeout) as cluster,
    ):
        measured = asyncio.run(measure(cluster, options.how))
    print(json.dumps({"how": options.how, "node_timeout_ms": options.node_timeout} | measured))


if __name__ == "__main__":
    main()
