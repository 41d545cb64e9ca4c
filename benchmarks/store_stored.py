"""What a block costs as more of them are stored: processor time of the store alone, with small blocks."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.store_blocks import bench_block, bench_key
from tq_store.backends.memory import MemoryBackend
from tq_store.block import HEADER_BYTES
from tq_store.keys import BlockKey
from tq_store.tiering.store import TieredStore

_BLOCK_BYTES = HEADER_BYTES + 256
_BATCH = 128
_TIMED_BATCHES = 60
_BUDGET_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCost:
    """Processor time of calls that carry `_BATCH` small blocks, sorted, in ms, with so many blocks stored."""

    stored_blocks: int
    block_bytes: int
    batch: int
    times_ms: dict[str, list[float]]


def stored_costs(counts: Sequence[int]) -> Iterator[StoredCost]:
    """Costs at each of these numbers of stored blocks, which must grow; yields as it gets there."""
    with asyncio.Runner() as runner:
        memory = MemoryBackend(budget_bytes=_BUDGET_BYTES)
        store = TieredStore([memory])
        num_stored = 0
        for count in counts:
            runner.run(_fill(memory, num_stored, count))
            num_stored = count
            yield runner.run(_measure(store, count))
        runner.run(store.close())


async def _fill(memory: MemoryBackend, first: int, end: int) -> None:
    """Put past the store, which would check what is not a block: a million real ones take minutes to make."""
    for start in range(first, end, _BATCH):
        numbers = range(start, min(start + _BATCH, end))
        await memory.put([(bench_key(number), b"%*d" % (_BLOCK_BYTES, number)) for number in numbers])


async def _measure(store: TieredStore, count: int) -> StoredCost:
    times_ms: dict[str, list[float]] = {op: [] for op in ("put", "get", "lookup", "all")}
    for number in range(_TIMED_BATCHES):
        fresh = _blocks(count + number * _BATCH, count + (number + 1) * _BATCH)
        # spread over all that is stored, so that caches help no more than they would
        stored = [bench_key((number * 7919 + step * 104_729) % count) for step in range(_BATCH)]
        before = time.process_time()
        await store.put(fresh)
        times_ms["put"].append((time.process_time() - before) * 1000)
        before = time.process_time()
        blocks = await store.get(stored)
        times_ms["get"].append((time.process_time() - before) * 1000)
        before = time.process_time()
        num_hits = await store.lookup(stored)
        times_ms["lookup"].append((time.process_time() - before) * 1000)
        times_ms["all"].append(sum(times_ms[op][-1] for op in ("put", "get", "lookup")))
        assert None not in blocks
        assert num_hits == _BATCH
        await store.delete([key for key, _ in fresh])
    return StoredCost(
        stored_blocks=count,
        block_bytes=_BLOCK_BYTES,
        batch=_BATCH,
        times_ms={op: sorted(values) for op, values in times_ms.items()},
    )


def _blocks(first: int, end: int) -> list[tuple[BlockKey, bytes]]:
    return [bench_block(number, _BLOCK_BYTES) for number in range(first, end)]
