"""Pages a second into a server on the same host and back, beside a thread that keeps the interpreter busy.

`python -m benchmarks.sglang_pages` starts a server on a Unix socket, and saves and loads the pages of one
prompt of Llama-8B layers through `PageStore`, as SGLang's storage threads do: bf16 pages as they are
(`none`), and those of a pool that is packed already (`tq4`). Each once alone, and once for each of
`--rests-ms` while another thread runs as SGLang's scheduler does between two batches: some Python, a look at
a socket, and that rest. It prints a JSON line for each of them, with the median over `--rounds` and the best,
which says more on a machine that others use. `cpu_page_ms` is processor time of both processes, without the
busy thread's.

Falsified by: `packed` pages that take longer than 0.25 ms to load or 0.4 ms to save with `rest_ms` 0.
"""

import argparse
import itertools
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from connectors.sglang.host_pool import HostMemory

from benchmarks.circumstances import circumstances
from benchmarks.store_processes import TqStore
from tq_connectors.codec import CacheGeometry
from tq_connectors.engine.interpreter import SWITCH_INTERVAL_S
from tq_connectors.sglang.hicache_settings import PageSettings
from tq_connectors.sglang.host_pages import HostPages, read_host_pool
from tq_connectors.sglang.page_rows import num_pairs
from tq_connectors.sglang.page_setup import Place, open_page_store
from tq_connectors.sglang.page_store import PageStore
from tq_kernels import PageLayout, preset
from tq_store.client import StoreClient

HEADS, HEAD_DIM, PAGE_TOKENS = 8, 128, 64
CASES = ("none", "tq4", "packed")
"""What becomes of pages on the way: nothing, they are packed on the CPU, or the engine has packed them."""
_TURN = 4000
"""Squares in one turn of the busy thread: 100 to 200 us."""


def host_pages(case: str, num_pages: int, num_layers: int) -> HostPages:
    """A host pool of so many pages, with something in it."""
    sizes = {"num_pages": num_pages, "page_size": PAGE_TOKENS, "heads": HEADS}
    if case != "packed":
        pool = HostMemory("page_first_direct", **sizes, layers=num_layers, dim=HEAD_DIM)
        return read_host_pool(pool.fill(1))
    layout = PageLayout(spec=preset("tq4"), head_dim=HEAD_DIM, num_kv_heads=HEADS, page_tokens=PAGE_TOKENS)
    shape = {"layers": num_pairs(num_layers), "dim": layout.slot_bytes}
    pool = HostMemory("page_first_direct", **sizes, **shape, dtype=torch.uint8)
    pool.kv_buffer.random_(256)
    return read_host_pool(pool)


@contextmanager
def busy_thread(rest_ms: float) -> Iterator[None]:
    """A thread that lets the interpreter go for a system call a turn, and rests so long."""
    mine, other = socket.socketpair()
    mine.setblocking(False)
    is_over = threading.Event()

    def spin() -> None:
        while not is_over.is_set():
            with suppress(BlockingIOError):
                mine.recv(1)
            [number * number for number in range(_TURN)]
            if rest_ms:
                time.sleep(rest_ms / 1e3)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        mine.close()
        other.close()


def page_ms(
    move: Callable[[Sequence[str], Callable[[int], torch.Tensor]], list[bool]],
    hashes: Sequence[str],
    page_at: Callable[[int], torch.Tensor],
) -> float:
    """Milliseconds a page; all of them must be moved."""
    started = time.perf_counter()
    is_moved = move(hashes, page_at)
    elapsed_s = time.perf_counter() - started
    if not all(is_moved):
        raise RuntimeError(f"{is_moved.count(False)} of {len(hashes)} pages were not moved")
    return elapsed_s * 1e3 / len(hashes)


def measure(
    store: PageStore, pages: HostPages, num_pages: int, rounds: int, cpu_s: Callable[[], float]
) -> dict[str, float]:
    """Saving pages that the store lacks, and loading them: medians, the best, and processor time."""
    hashes = [f"{number:064x}" for number in range(num_pages)]
    times: dict[str, list[float]] = {"save": [], "load": []}
    processor_s = {"save": 0.0, "load": 0.0}
    for _ in range(rounds):
        store.purge()
        for name, move in (("save", store.save), ("load", store.load)):
            before_s = cpu_s()
            times[name].append(page_ms(move, hashes, lambda place: pages.page(PAGE_TOKENS * place)))
            processor_s[name] += cpu_s() - before_s
    measured: dict[str, float] = {}
    for name, each in times.items():
        measured |= {
            f"{name}_page_ms": round(statistics.median(each), 3),
            f"{name}_best_ms": round(min(each), 3),
            f"{name}_pages_per_s": round(1e3 / statistics.median(each)),
            f"{name}_cpu_page_ms": round(processor_s[name] * 1e3 / (rounds * num_pages), 3),
        }
    return measured


def run_case(
    server: TqStore, client: StoreClient, case: str, load_threads: int, parsed: argparse.Namespace
) -> None:
    """Print the lines of a case."""
    pages = host_pages(case, parsed.pages, parsed.layers)
    settings = PageSettings(
        revision="v1",
        codec="tq4" if case == "packed" else case,
        device="cpu",
        load_threads=load_threads,
    )
    geometry = CacheGeometry(
        num_layers=parsed.layers, num_kv_heads=HEADS, head_dim=HEAD_DIM, kv_dtype="bfloat16"
    )
    place = Place(model="model", geometry=geometry, layers=range(parsed.layers))
    store = open_page_store(client, settings, pages.shape, place)

    def cpu_s() -> float:
        return server.cpu_s() + time.process_time()

    measure(store, pages, parsed.pages, 1, cpu_s)
    for rest_ms in (None, *parsed.rests_ms):
        with nullcontext() if rest_ms is None else busy_thread(rest_ms):
            measured = measure(store, pages, parsed.pages, parsed.rounds, cpu_s)
        if rest_ms is not None:
            for name in ("save_cpu_page_ms", "load_cpu_page_ms"):
                del measured[name]
        row = {
            "case": case,
            "rest_ms": rest_ms,
            **measured,
            "stored_page_bytes": store.stored_page_bytes,
            "pages": parsed.pages,
            "layers": parsed.layers,
            "load_threads": load_threads,
            "switch_interval_ms": round(sys.getswitchinterval() * 1e3, 3),
            **circumstances(),
        }
        print(json.dumps(row), flush=True)
    store.purge()
    store.close()


def main() -> None:
    """Parse the command line and run the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["none", "packed"], choices=CASES)
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rests-ms", nargs="+", type=float, default=[0.0])
    threads = PageSettings(revision="", codec="none").load_threads
    parser.add_argument("--load-threads", nargs="+", type=int, default=[threads])
    parser.add_argument(
        "--switch-interval-ms", type=float, default=SWITCH_INTERVAL_S * 1e3, help="Python's own is 5"
    )
    parsed = parser.parse_args()
    sys.setswitchinterval(parsed.switch_interval_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--memory-budget", "4GiB", "--max-inflight", "1GiB", "--max-outflight", "1GiB")
        with TqStore(Path(folder), *options) as server, StoreClient(server.local_address) as client:
            for case, load_threads in itertools.product(parsed.cases, parsed.load_threads):
                run_case(server, client, case, load_threads, parsed)


if __name__ == "__main__":
    main()
