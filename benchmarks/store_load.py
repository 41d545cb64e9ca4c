"""A process that loads a store: lines of JSON tell it what to do, from several clients at once.

`benchmarks/store.py` starts as many of these as there are cores and spreads the clients over them; each
client is a thread with a connection of its own, as `redis-benchmark -c` counts them. A command:

    {"op": "get", "address": "127.0.0.1:7437", "block_bytes": 4194304, "clients": [0, 1], "seconds": 1.0,
     "start_at": 12345.6, "num_keys": 16, "with_pipes": true}

`clients` are the numbers of this process's clients, so that each has keys of its own to put. Without
pipes everything goes through grpc. The answer:

    {"bytes": 1234, "elapsed_s": 1.01, "cpu_s": 0.8, "times_ms": [3.2, ...]}
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.store_blocks import bench_block, bench_key
from tq_store.client import StoreClient
from tq_store.config import ClientConfig

LOOKUP_KEYS = 128
LOAD_BLOCKS = 16
_PUT_BLOCKS = 4
_CLIENT = ClientConfig(lookup_timeout_s=60.0, transfer_timeout_s=120.0, admin_timeout_s=60.0)
_STREAMS = replace(_CLIENT, pipes=0)
_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing to do; see the module."""

    op: str
    address: str
    block_bytes: int
    clients: list[int]
    seconds: float
    start_at: float
    num_keys: int
    with_pipes: bool


class _Failed(RuntimeError):
    """A call did not do what it should; its time would mean nothing."""


def _fill(command: Command, client: StoreClient) -> None:
    """Put the blocks that gets and lookups ask for, and wait until they are where they belong."""
    for number in range(command.num_keys):
        client.put([bench_block(number, command.block_bytes)])
    _wait_until_there(client, [bench_key(number) for number in range(command.num_keys)])


def _wait_until_there(client: StoreClient, keys: list[Any]) -> None:
    deadline = time.monotonic() + 60
    while not all(client.contains(keys)):
        if time.monotonic() > deadline:
            raise _Failed("blocks that were put did not arrive within 60 s")
        time.sleep(_POLL_S)


def _gets(command: Command, client: StoreClient, number: int, blocks_a_call: int) -> Iterator[int]:
    position = number * 7
    while True:
        keys = [bench_key((position + step) % command.num_keys) for step in range(blocks_a_call)]
        num_bytes = 0
        for _, block in client.get(keys):
            if block is None:
                raise _Failed("a block that was put is a miss")
            num_bytes += len(block)
        position += blocks_a_call
        yield num_bytes


def _puts(command: Command, client: StoreClient, number: int) -> Iterator[int]:
    """Put a few blocks, one a call, wait until the lowest tier has all, and remove them."""
    first = 1_000_000 + number * 1000
    blocks = [bench_block(first + step, command.block_bytes) for step in range(_PUT_BLOCKS)]
    keys = [key for key, _ in blocks]
    client.delete(keys)
    while True:
        for block in blocks:
            client.put([block])
            yield len(block[1])
        _wait_until_there(client, keys)
        client.delete(keys)


def _churn(command: Command, client: StoreClient, number: int) -> Iterator[int]:
    """Put ever new blocks of varying size, and read some that may be gone by now; ends after `num_keys`."""
    chance = random.Random(number)
    first = number * 1_000_000
    for step in range(command.num_keys):
        block_bytes = chance.randrange(command.block_bytes // 2, command.block_bytes)
        block = bench_block(first + step, block_bytes // 4096 * 4096)
        client.put([block])
        keys = [bench_key(first + chance.randrange(step + 1)) for _ in range(2)]
        num_bytes = len(block[1])
        yield num_bytes + sum(len(found or b"") for _, found in client.get(keys))


def _lookups(command: Command, client: StoreClient) -> Iterator[int]:
    keys = [bench_key(step % command.num_keys) for step in range(LOOKUP_KEYS)]
    while True:
        if client.lookup(keys) != LOOKUP_KEYS:
            raise _Failed("a block that was put is not found")
        yield 0


def _steps(command: Command, client: StoreClient, number: int) -> Iterator[int]:
    """Calls of one client; each gives the block bytes that it moved."""
    makers: dict[str, Callable[[], Iterator[int]]] = {
        "get": lambda: _gets(command, client, number, 1),
        "load": lambda: _gets(command, client, number, LOAD_BLOCKS),
        "put": lambda: _puts(command, client, number),
        "lookup": lambda: _lookups(command, client),
        "churn": lambda: _churn(command, client, number),
    }
    return makers[command.op]()


def _run_client(command: Command, number: int) -> tuple[int, float, list[float]]:
    """Bytes moved, seconds taken and the time of each call in ms."""
    with StoreClient(command.address, config=_CLIENT if command.with_pipes else _STREAMS) as client:
        client.ping()
        steps = _steps(command, client, number)
        next(steps)  # connects, allocates and finds its pace
        while time.monotonic() < command.start_at:
            time.sleep(0.001)
        started = before = time.monotonic()
        moved, times_ms = 0, []
        while before - started < command.seconds:
            step = next(steps, None)
            if step is None:
                break
            moved += step
            after = time.monotonic()
            times_ms.append((after - before) * 1000)
            before = after
        return moved, before - started, times_ms


def run(command: Command) -> dict[str, Any]:
    """Do what a command says."""
    if command.op in ("fill", "drop"):
        with StoreClient(command.address, config=_CLIENT) as client:
            if command.op == "fill":
                _fill(command, client)
            else:
                client.delete([bench_key(number) for number in range(command.num_keys)])
        return {"bytes": 0, "elapsed_s": 0.0, "cpu_s": 0.0, "times_ms": []}
    cpu_before_s = time.process_time()
    with ThreadPoolExecutor(len(command.clients)) as threads:
        results = list(threads.map(lambda number: _run_client(command, number), command.clients))
    return {
        "bytes": sum(moved for moved, _, _ in results),
        "elapsed_s": max(elapsed_s for _, elapsed_s, _ in results),
        "cpu_s": time.process_time() - cpu_before_s,
        "times_ms": [time_ms for _, _, times_ms in results for time_ms in times_ms],
    }


def main() -> None:
    """Answer commands until the input ends."""
    for line in sys.stdin:
        try:
            answer = run(Command(**json.loads(line)))
        except Exception as error:  # the one who asked decides what that means
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
