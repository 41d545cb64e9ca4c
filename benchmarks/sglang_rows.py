"""How fast SGLang's host tier moves rows of other sizes than its kernels were made for. SGLang 0.5.17, a GPU.

`python -m benchmarks.sglang_rows` copies pages of 64 tokens between a device pool and a host pool of SGLang
by its own functions, and prints one JSON line for every row size, layout and way of copying that it takes;
each size and way in a process of its own, as a copy that is refused may leave the device unfit for others.
Rows of a multiple of 128 bytes take the kernel that SGLang compiles, others the one that it ships. `tq4` has
rows of 1,088 bytes (8 KV heads of 128 channels); 1,152 is what they would be if they were padded.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sglang
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from benchmarks.circumstances import device_name

ROOT = Path(__file__).parents[1]
PAGE, HEADS = 64, 8
ROWS = {
    "tq4": 1088,
    "tq4 of 128 tokens": 1072,
    "tq4 padded": 1152,
    "tq3": 832,
    "tq3 padded": 896,
    "bf16": 2048,
}
WAYS = (("layer_first", "kernel"), ("page_first", "kernel"), ("page_first_direct", "direct"))


def seconds(copy: Callable[[], None], repeats: int) -> float:
    """Median time of a copy, from a device that has nothing to do until it has nothing to do again."""
    copy()
    times = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        copy()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    row_bytes: int, layout: str, way: str, *, tokens: int, layers: int, repeats: int
) -> dict[str, float]:
    """GB/s to the host and back, every page to another place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = MHATokenToKVPool(
        tokens,
        PAGE,
        dtype=torch.uint8,
        head_num=HEADS,
        head_dim=row_bytes // HEADS,
        layer_num=layers // 2,
        device=device,
        enable_memory_saver=False,
    )
    host = MHATokenToKVPoolHost(pool, 1.0, 0, PAGE, layout)
    order = torch.randperm(tokens // PAGE, generator=torch.Generator().manual_seed(2))
    on_device = ((order + 1)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    on_host = torch.arange(tokens)
    # as its controller does: SGLang's own kernel for saving pages wants host places on the host
    places = on_host
    if way == "kernel":
        on_device, on_host = on_device.to(device), on_host.to(device)
        if not (layout == "page_first" and host.can_use_write_back_jit):
            places = on_host

    def load() -> None:
        for layer in range(pool.layer_num):
            host.load_to_device_per_layer(pool, on_host, on_device, layer, way)

    def backup() -> None:
        host.backup_from_device_all_layer(pool, places, on_device, way)

    moved = tokens * row_bytes * layers
    speeds = {
        "to_host_gbps": round(moved / seconds(backup, repeats) / 1e9, 1),
        "to_device_gbps": round(moved / seconds(load, repeats) / 1e9, 1),
    }
    host.destroy()
    return speeds


def _run_case(parsed: argparse.Namespace, name: str, way: str) -> None:
    """Print the lines of a row size and a way of copying."""
    about = {
        "sglang": sglang.__version__,
        "device": device_name(),
        "tokens": parsed.tokens,
        "layers": parsed.layers,
    }
    for layout, _ in filter(lambda each: each[1] == way, WAYS):
        row = {"rows": name, "row_bytes": ROWS[name], "layout": layout, "way": way}
        try:
            speeds = measure(
                ROWS[name], layout, way, tokens=parsed.tokens, layers=parsed.layers, repeats=parsed.repeats
            )
        except RuntimeError as refused:  # of a way that SGLang's kernels do not take on this device
            print(f"{name}, {layout}, {way}: {str(refused).splitlines()[0]}", file=sys.stderr)
            return
        print(json.dumps(row | speeds | about), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sglang_rows", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["kernel", "direct"], choices=["kernel", "direct"])
    parser.add_argument("--in-process", nargs=2, metavar=("ROWS", "WAY"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.in_process:
        _run_case(parsed, *parsed.in_process)
        return 0
    own = list(sys.argv[1:] if arguments is None else arguments)
    for name, way in itertools.product(ROWS, parsed.ways):
        command = [sys.executable, "-m", "benchmarks.sglang_rows", *own, "--in-process", name, way]
        subprocess.run(command, check=False, cwd=ROOT)  # noqa: S603
    return 0


if __name__ == "__main__":
    sys.exit(main())
