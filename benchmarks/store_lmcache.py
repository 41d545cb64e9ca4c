"""Times a Redis client of LMCache's; runs in an environment that has LMCache and knows nothing of tq-store.

    python store_lmcache.py resp|redis get|put|lookup PORT VALUE_BYTES CLIENTS SECONDS NUM_KEYS

``resp`` is its C++ client with a thread a client, into buffers of ours; ``redis`` is what its Redis connector
does with redis-py: two keys a chunk, metadata and bytes. Prints one line of JSON.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

LOOKUP_KEYS = 128
_METADATA_BYTES = 28

Call = Callable[[int], Awaitable[None]]


async def _resp(op: str, port: int, value_bytes: int, clients: int, num_keys: int) -> Call:
    from lmcache.v1.storage_backend.native_clients.resp_client import RESPClient

    client = RESPClient("127.0.0.1", port, clients, asyncio.get_running_loop())
    keys = [f"lmcache:resp:{value_bytes}:{number}" for number in range(num_keys)]
    buffers = [bytearray(value_bytes) for _ in range(clients)]
    for key in keys:
        await client.set(key, memoryview(buffers[0]))
    asked = [keys[number % num_keys] for number in range(LOOKUP_KEYS)]
    turns = [0] * clients

    def next_key(number: int) -> str:
        turns[number] += 1
        return keys[(number * 7 + turns[number]) % num_keys]

    async def get(number: int) -> None:
        await client.get(next_key(number), memoryview(buffers[number]))

    async def put(number: int) -> None:
        await client.set(next_key(number), memoryview(buffers[number]))

    async def lookup(_: int) -> None:
        if not all(await client.batch_exists(asked)):
            raise RuntimeError("a key that was set does not exist")

    return {"get": get, "put": put, "lookup": lookup}[op]


async def _redis(op: str, port: int, value_bytes: int, clients: int, num_keys: int) -> Call:
    import redis.asyncio

    pool = redis.asyncio.ConnectionPool.from_url(f"redis://127.0.0.1:{port}", max_connections=150)
    connection = redis.asyncio.Redis.from_pool(pool)
    keys = [f"lmcache:redis:{value_bytes}:{number}" for number in range(num_keys)]
    value, metadata = bytes(value_bytes), bytes(_METADATA_BYTES)
    target = bytearray(value_bytes)
    turns = [0] * clients

    async def store(key: str) -> None:
        await connection.set(key + "kv_bytes", value)
        await connection.set(key + "metadata", metadata)

    for key in keys:
        await store(key)

    def next_key(number: int) -> str:
        turns[number] += 1
        return keys[(number * 7 + turns[number]) % num_keys]

    async def get(number: int) -> None:
        key = next_key(number)
        if not await connection.get(key + "metadata"):
            raise RuntimeError("a key that was set is gone")
        target[:] = await connection.get(key + "kv_bytes")

    async def put(number: int) -> None:
        await store(next_key(number))

    return {"get": get, "put": put}[op]


async def _measure(call: Call, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Seconds in all, and the time of each call in ms."""
    times_ms: list[float] = []
    started = time.monotonic()

    async def run(number: int) -> None:
        before = time.monotonic()
        while before - started < seconds:
            await call(number)
            after = time.monotonic()
            times_ms.append((after - before) * 1000)
            before = after

    await asyncio.gather(*(call(number) for number in range(clients)))
    started = time.monotonic()
    await asyncio.gather(*(run(number) for number in range(clients)))
    return time.monotonic() - started, sorted(times_ms)


async def _main(
    kind: str, op: str, port: int, value_bytes: int, clients: int, seconds: float, num_keys: int
) -> None:
    maker = {"resp": _resp, "redis": _redis}[kind]
    elapsed_s, times_ms = await _measure(
        await maker(op, port, value_bytes, clients, num_keys), clients, seconds
    )
    moved = 0 if op == "lookup" else len(times_ms) * value_bytes
    answer = {
        "gib_per_s": moved / elapsed_s / 2**30 if moved else None,
        "p50_ms": times_ms[len(times_ms) // 2],
        "p99_ms": times_ms[len(times_ms) * 99 // 100],
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(
        _main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), float(sys.argv[6]), int(sys.argv[7]))
    )
    import os

    os._exit(0)  # its native client keeps threads that no longer end by themselves
