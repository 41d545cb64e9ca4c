"""Cut, lossy, repeating, shuffled, flipped and silent connections between a store and its Redis.

The same faults as between engines and their server, one step further down: the store answers with right
blocks or misses, raises nothing, and works again over a connection that is whole.
"""

import asyncio
import time

from faults.proxy import Kind, proxied, random_fault
from faults.sockets import COUNTED_AS
from faults.trial import Result, Trial
from faults.workload import SLACK_S, check_redis_values, numbered_blocks
from store.redis_process import RedisProcess
from store.sample_blocks import keys_of

from tq_store.backends.memory import MemoryBackend
from tq_store.backends.redis import RedisBackend
from tq_store.errors import BackendError
from tq_store.tiering.store import TieredStore

_ROUNDS = 8
"""Of every kind of fault."""
_SHARED = range(10)
_STREAM_BYTES = 1_200_000
_LONGEST_CALL_S = 10.0


def run(trial: Trial) -> None:
    directory = trial.directory / "redis"
    directory.mkdir()
    redis = RedisProcess(directory)
    try:
        asyncio.run(_fill(redis.url))
        faults = [
            random_fault(trial.rng, kind, upward_bytes=_STREAM_BYTES, downward_bytes=_STREAM_BYTES)
            for _ in range(trial.times(_ROUNDS))
            for kind in Kind
        ]
        for turn, fault in enumerate(faults, 1):
            with proxied(f"unix:{redis.socket}", fault) as proxy:
                asyncio.run(_work(trial.result, proxy.address, range(10 * turn, 10 * turn + 5)))
                trial.result.count(COUNTED_AS[fault.kind], proxy.struck)
        check_redis_values(trial.result, redis.url, range(10 * len(faults) + 10))
    finally:
        redis.kill()


async def _fill(url: str) -> None:
    backend = await RedisBackend.open(url)
    await backend.put(numbered_blocks(_SHARED))
    await backend.close()


async def _work(result: Result, address: str, numbers: range) -> None:
    """Load what is shared, store something, load that; memory holds nothing, so all of it goes to Redis."""
    try:
        backend = await RedisBackend.open(f"redis://{address}")
    except BackendError:
        return  # a server would not start, and say so
    store = TieredStore([MemoryBackend(budget_bytes=1), backend])
    shared, own = numbered_blocks(_SHARED), numbered_blocks(numbers)
    started = time.monotonic()
    try:
        for blocks, is_put in ((shared, False), (own, True), (own, False), (shared, False)):
            if is_put:
                await store.put(blocks)
                await store.flush()
                continue
            for (_, block), served in zip(blocks, await store.get(keys_of(blocks)), strict=True):
                if served is not None and served != block:
                    result.served_wrong("a block came from a mangled Redis connection with other bytes")
    except Exception as error:
        result.failed_request(f"the store raised {error!r}")
    finally:
        await store.close()
    elapsed_s = time.monotonic() - started
    result.expect(elapsed_s < _LONGEST_CALL_S + SLACK_S, f"the store waited {elapsed_s:.1f} s for Redis")
