"""Time the server's answer to a batch of pages through shared memory, beside copying the same bytes.

    python -m benchmarks.shared_pages                        30 pages of SGLang a call, 7 chunks of vLLM
    python -m benchmarks.shared_pages --cores 2 4 16         with the server on so many processors
    python -m benchmarks.shared_pages --pages 60 --page-bytes 557312

One thread asks. `get` is the call that fills the segment, `put` the one that stores what lies there, `copy`
one thread of this process copying as much from blocks to shared memory. Milliseconds a page: the best call,
the median, and the server's processor time in the mean, for a put with that of removing the page before.
"""

import argparse
import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.store_blocks import bench_block
from benchmarks.store_processes import BenchmarkError, TqStore
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.rpc.connection import Connection
from tq_store.rpc.segment import Segment, SegmentPool

BATCHES = ((30, 557_312), (7, 2_229_504))
"""Pages a call and their bytes: packed pages of SGLang, chunks of vLLM."""
_SETS = 4
"""Calls ask for other pages in turn, so that not all of them lie in the processor's cache."""
_ROUNDS = 60
_TIMEOUT_S = 30.0

Block = tuple[BlockKey, bytes]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parsed = _parser().parse_args(arguments)
    batches = ((parsed.pages, parsed.page_bytes),) if parsed.pages and parsed.page_bytes else BATCHES
    own = os.sched_getaffinity(0)
    for num_pages, page_bytes in batches:
        sets = [
            [bench_block(first * num_pages + page, page_bytes) for page in range(num_pages)]
            for first in range(_SETS)
        ]
        _line(f"copy {num_pages} x {page_bytes}", num_pages, _timed(_copies(sets), parsed.rounds), None)
        for cores in parsed.cores or [len(own)]:
            with tempfile.TemporaryDirectory(prefix="tq-bench-") as folder:
                os.sched_setaffinity(0, sorted(own)[:cores])
                with TqStore(Path(folder), "--memory-budget", "2GiB") as server:
                    os.sched_setaffinity(0, own)
                    _measure(server, sets, f"{num_pages} x {page_bytes}, {cores} cores", parsed.rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pages", type=int, metavar="N", help="in a call; together with --page-bytes")
    parser.add_argument("--page-bytes", type=int, metavar="N")
    parser.add_argument("--cores", type=int, nargs="+", metavar="N", help="for the server (default: all)")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, metavar="N", help="(default: %(default)s)")
    return parser


def _measure(server: TqStore, sets: Sequence[Sequence[Block]], what: str, rounds: int) -> None:
    """Put and get through one segment, asked for without a client's own copying."""
    num_pages, address = len(sets[0]), server.local_address
    num_bytes = sum(len(block) for _, block in sets[0])
    pool, connection = SegmentPool(address, num_bytes), Connection(address, ClientConfig(address=address))
    with StoreClient(address) as client, pool.lend(_TIMEOUT_S) as segment:
        if segment is None:
            raise BenchmarkError("the server takes no shared memory")
        before_s, times_s = server.cpu_s(), []
        for turn in range(rounds):
            blocks = sets[turn % _SETS]
            client.delete([key for key, _ in blocks])
            segment.write(0, b"".join(block for _, block in blocks))
            times_s += _timed([partial(_put, connection, segment, blocks)], 1)
        _line(f"put  {what}", num_pages, times_s, (server.cpu_s() - before_s) / rounds)
        before_s = server.cpu_s()
        times_s = _timed([partial(_get, connection, segment, blocks) for blocks in sets], rounds)
        _line(f"get  {what}", num_pages, times_s, (server.cpu_s() - before_s) / rounds)
    pool.close()
    connection.close()


def _put(connection: Connection, segment: Segment, blocks: Sequence[Block]) -> None:
    request = convert.pack_shared_put(segment.handle, [(key, len(block)) for key, block in blocks])
    parse = partial(convert.parse_outcomes, num_blocks=len(blocks))
    outcomes = connection.ask("PutShared", request, parse, timeout_s=_TIMEOUT_S, is_idempotent=False)
    if set(outcomes) != {PutOutcome.STORED}:
        raise BenchmarkError("a page was not stored")


def _get(connection: Connection, segment: Segment, blocks: Sequence[Block]) -> None:
    request = convert.pack_shared_get(segment.handle, [key for key, _ in blocks])
    parse = partial(convert.parse_shared_sizes, num_keys=len(blocks), segment_bytes=segment.num_bytes)
    sizes_bytes = connection.ask("GetShared", request, parse, timeout_s=_TIMEOUT_S)
    if sizes_bytes != [len(block) for _, block in blocks]:
        raise BenchmarkError("a page that was put is a miss")


def _copies(sets: Sequence[Sequence[Block]]) -> list[Callable[[], None]]:
    """What copies each set into shared memory."""
    num_bytes = sum(len(block) for _, block in sets[0])
    fd = os.memfd_create("tq-bench")
    os.posix_fallocate(fd, 0, num_bytes)
    memory = mmap.mmap(fd, num_bytes)
    os.close(fd)
    place = (ctypes.c_char * num_bytes).from_buffer(memory)

    def copy(blocks: Sequence[Block]) -> None:
        offset = 0
        for _, block in blocks:
            ctypes.memmove(ctypes.byref(place, offset), block, len(block))
            offset += len(block)

    return [partial(copy, blocks) for blocks in sets]


def _timed(calls: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each of so many calls, in turn."""
    times_s = []
    for turn in range(rounds):
        started = time.perf_counter()
        calls[turn % len(calls)]()
        times_s.append(time.perf_counter() - started)
    return times_s


def _line(what: str, num_pages: int, times_s: Sequence[float], cpu_s: float | None) -> None:
    ordered = sorted(1000 * each / num_pages for each in times_s)
    work = f", {1000 * cpu_s / num_pages:.4f} of the server's processors" if cpu_s is not None else ""
    print(f"{what:32} best {ordered[0]:.4f}, median {ordered[len(ordered) // 2]:.4f} ms a page{work}")


if __name__ == "__main__":
    main()
