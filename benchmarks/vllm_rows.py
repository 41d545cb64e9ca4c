"""Load the rows of one prefix as vLLM's tier does, from a server through a link, without an engine.

    python -m benchmarks.vllm_rows                         16,384 tokens of Llama-8B, 10 Gbit/s
    python -m benchmarks.vllm_rows --layers 8 --gbits 0    no link between: what both sides can do

A row is a chunk of 256 tokens, all layers. The server and the link are processes of their own, and rows are
filled by `StoredRows` in memory that is there from the start, like vLLM's. A JSON line for each case:
`link_ms` is what the bytes take at the rate, `alone_ms` what they take from one plain socket to another on
the same way, `load_ms` each load in turn. The first one, which opens the connections, counts nowhere else.
"""

import argparse
import itertools
import json
import mmap
import random
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.shaped_link import shaped_process
from benchmarks.store_processes import BenchmarkError, TqStore
from tq_connectors.engine.interpreter import share_interpreter
from tq_connectors.vllm.rows import PageRows
from tq_connectors.vllm.store_rows import Row, StoredRows
from tq_kernels import PageLayout, preset
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey

WAYS = {"pipes": 8, "streams": 0}
"""How a load comes, and the connections that a client has beside grpc for it."""
_CHUNK_TOKENS, _PAGE_TOKENS, _HEADS, _HEAD_DIM = 256, 64, 8, 128
_TIMEOUT_S = 60.0


def rows_of(name: str, num_layers: int) -> PageRows:
    """The rows of a preset."""
    layout = PageLayout(spec=preset(name), head_dim=_HEAD_DIM, num_kv_heads=_HEADS, page_tokens=_PAGE_TOKENS)
    return PageRows(layout, num_layers, _CHUNK_TOKENS // _PAGE_TOKENS)


@contextmanager
def memory_of(num_bytes: int) -> Iterator[memoryview]:
    """Shared memory that is there, as vLLM's is."""
    with mmap.mmap(-1, num_bytes) as memory, memoryview(memory) as view:
        page = random.Random(num_bytes).randbytes(1 << 20)
        for start in range(0, num_bytes, len(page)):
            view[start : start + len(page)] = page[: num_bytes - start]
        yield view


def measure(options: argparse.Namespace, name: str, gbit: float) -> Iterator[dict[str, Any]]:
    """A row for each way and number of threads."""
    rows = rows_of(name, options.layers)
    num_rows = options.tokens // _CHUNK_TOKENS
    num_bytes = num_rows * rows.cell_bytes
    keys = [BlockKey(number.to_bytes(BLOCK_KEY_BYTES, "big")) for number in range(num_rows)]
    with ExitStack() as stack:
        memory = stack.enter_context(memory_of(num_bytes))
        places = [memory[start : start + rows.cell_bytes] for start in range(0, num_bytes, rows.cell_bytes)]
        for place in places:
            stack.enter_context(place)
        wanted = [Row(*each) for each in zip(keys, places, strict=True)]
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tq-bench-")))
        server = stack.enter_context(TqStore(directory, "--memory-budget", "4GiB"))
        with StoreClient(server.local_address) as near:
            stored = StoredRows(near, rows)
            is_there = stored.put(wanted)
            stored.close()
        if not all(is_there):
            raise BenchmarkError("a row was not stored; try fewer --tokens or --layers")
        address = stack.enter_context(shaped_process(server.ports, gbit)) if gbit else server.address
        about = {
            "preset": name,
            "link_gbit": gbit or None,
            "rows": num_rows,
            "row_bytes": rows.cell_bytes,
            "link_ms": round(num_bytes * 8 / gbit / 1e6, 1) if gbit else None,
            "alone_ms": round(_alone_ms(num_bytes, gbit), 1),
        }
        for way, load_threads in itertools.product(options.ways, options.load_threads):
            config = ClientConfig(address=address, pipes=WAYS[way], transfer_timeout_s=_TIMEOUT_S)
            with StoreClient(config=config) as client:
                stored = StoredRows(client, rows, load_threads=load_threads)
                measured = _loads(stored, wanted, server, options.rounds, options.pause_s)
                stored.close()
            yield about | {"way": way, "load_threads": load_threads} | measured


def _loads(
    stored: StoredRows, wanted: Sequence[Row], server: TqStore, rounds: int, pause_s: float
) -> dict[str, Any]:
    """Loads in turn: milliseconds, processor time of both sides, and the client's page faults a load."""
    times_ms: list[float] = []
    before = 0.0, 0.0, 0
    for turn in range(rounds + 1):
        if turn == 1:  # the first one connects
            before = server.cpu_s(), time.process_time(), _faults()
        time.sleep(pause_s)
        started = time.perf_counter()
        is_there = stored.get(wanted)
        times_ms.append((time.perf_counter() - started) * 1e3)
        if not all(is_there):
            raise BenchmarkError(f"{is_there.count(False)} of {len(wanted)} rows were not loaded")
    gib = rounds * sum(len(row.memory) for row in wanted) / 2**30
    return {
        "load_ms": [round(each, 1) for each in times_ms],
        "median_ms": round(statistics.median(times_ms[1:]), 1),
        "worst_ms": round(max(times_ms[1:]), 1),
        "server_s_per_gib": round((server.cpu_s() - before[0]) / gib, 3),
        "client_s_per_gib": round((time.process_time() - before[1]) / gib, 3),
        "client_faults": round((_faults() - before[2]) / rounds),
    }


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _alone_ms(num_bytes: int, gbit: float) -> float:
    """What one plain socket takes, without a server."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port, host = listener.getsockname()[1], "127.0.0.1"
        if gbit:
            host = stack.enter_context(shaped_process([port], gbit)).rpartition(":")[0]
        near = stack.enter_context(socket.create_connection((host, port)))
        far, _ = listener.accept()
        stack.enter_context(far)
        sender = threading.Thread(target=_send, args=(far, num_bytes))
        buffer = bytearray(1 << 20)
        started = time.perf_counter()
        sender.start()
        while num_bytes > 0:
            received = near.recv_into(buffer)
            if not received:
                raise BenchmarkError("the link was cut")
            num_bytes -= received
        sender.join()
        return (time.perf_counter() - started) * 1e3


def _send(end: socket.socket, num_bytes: int) -> None:
    piece = bytes(1 << 20)
    for start in range(0, num_bytes, len(piece)):
        end.sendall(piece[: num_bytes - start])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tq4", "tq3"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gbits", nargs="+", type=float, default=[10.0], help="0 for no link")
    parser.add_argument("--ways", nargs="+", default=["pipes"], choices=WAYS)
    parser.add_argument("--load-threads", nargs="+", type=int, default=[4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause-s", type=float, default=0.0, help="before each load")
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    options = parser.parse_args()
    share_interpreter()
    about = {"commit": options.commit} if options.commit else circumstances()
    for name, gbit in itertools.product(options.presets, options.gbits):
        for row in measure(options, name, gbit):
            print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
