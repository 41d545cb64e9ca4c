"""Time cold pages on a GPU: reading them against the links that they come over, and making them.

Pages are made on the GPU from random vectors, read by the kernel, and first compared with the reference.

``python -m benchmarks.gpu.cold`` prints a table and writes ``benchmarks/results/cold_gpu.jsonl``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.circumstances import circumstances
from benchmarks.gpu.timing import Stopwatch
from tq_kernels import PRESETS, PageLayout, cold_page
from tq_kernels.cold_dequantize import dequantize_cold, read_symbols_on_device
from tq_kernels.cold_layout import ColdLayout
from tq_kernels.cold_sections import open_sections, read_symbols

RESULTS = Path(__file__).parents[1] / "results" / "cold_gpu.jsonl"
NAMES = ("tq4", "tq3", "tq2")
PAGES = (32, 256, 1024)
"""Pages at once: of one block, of 8 and of 32 blocks of an 8B model with 32 layers."""
LINK_GBPS = {"25 Gbit/s": 3.125, "100 Gbit/s": 12.5, "400 Gbit/s": 50.0}
_DISTINCT_PAGES = 32


def wall_s(call: Callable[[], object], runs: int) -> float:
    """Median of calls that wait for the device."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def check(pages: torch.Tensor, layout: ColdLayout) -> None:
    """Symbols of the kernel are those of the reference.

    Raises:
        RuntimeError: They are not, and a time would mean nothing.
    """
    wanted = read_symbols(open_sections(pages.cpu(), layout), layout)
    found = read_symbols_on_device(open_sections(pages, layout), layout)
    for one, other in zip(found, wanted, strict=True):
        if not torch.equal(one.cpu(), other.to(one.dtype)):
            raise RuntimeError("the kernel and the reference read different symbols")


def measure(
    name: str, num_pages: int, watch: Stopwatch, made: torch.Tensor, layout: ColdLayout
) -> dict[str, Any]:
    """One row; `made` are distinct pages, repeated as often as needed."""
    pages = made.repeat(-(-num_pages // len(made)), 1)[:num_pages]
    opened = open_sections(pages, layout)
    kernel_us = watch.time_graph([lambda: read_symbols_on_device(opened, layout)]).median_us
    whole_us = wall_s(lambda: dequantize_cold(pages, layout), 10) * 1e6
    bf16_bytes = 4 * num_pages * layout.page_tokens * layout.num_kv_heads * layout.head_dim
    return {
        "preset": name,
        "pages": num_pages,
        "page_bytes": layout.page_bytes,
        "kernel_us": kernel_us,
        "dequantize_us": whole_us,
        "coded_gbps": pages.numel() / kernel_us / 1e3,
        "dequantize_coded_gbps": pages.numel() / whole_us / 1e3,
        "dequantize_bf16_gbps": bf16_bytes / whole_us / 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    device = torch.device("cuda")
    watch = Stopwatch(device)
    facts = {
        **circumstances(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows = []
    for name in NAMES:
        lm = PageLayout(spec=PRESETS[name], head_dim=128, num_kv_heads=8, page_tokens=128)
        layout = ColdLayout(head_dim=128, num_kv_heads=8, page_tokens=128, section_bytes=lm.section_bytes)
        shape = (2, _DISTINCT_PAGES * 128, 8, 128)
        keys, values = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
        made = cold_page.quantize(keys, values, layout)
        quantize_s = wall_s(partial(cold_page.quantize, keys, values, layout), 3)
        check(made[:1], layout)
        for num_pages in PAGES:
            row = measure(name, num_pages, watch, made, layout)
            row["quantize_bf16_gbps"] = 4 * keys.numel() / quantize_s / 1e9
            rows.append(row)
            print(json.dumps(row))
    links = " | ".join(LINK_GBPS)
    print(f"\n| bytes of | pages | kernel, coded GB/s | dequantize, coded GB/s | {links} |")
    print("|---" * (4 + len(LINK_GBPS)) + "|")
    for row in rows:
        kept_up = " | ".join(f"{row['dequantize_coded_gbps'] / link:.1f}x" for link in LINK_GBPS.values())
        speeds = f"{row['coded_gbps']:.1f} | {row['dequantize_coded_gbps']:.1f}"
        print(f"| {row['preset']} | {row['pages']} | {speeds} | {kept_up} |")
    parsed.output.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
