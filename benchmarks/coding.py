"""What compressing blocks brings: bytes, speed on one core, and on which links it pays.

Pages of SmolLM2 on real text, and of Gaussian vectors at the shape of an 8B model. Ideal is the entropy of
the indices as they are distributed, everything else as it is; by plane is level 1 over all planes of one kind
put together, which needs to know the layout and is only measured here.

``python -m benchmarks.coding`` prints tables and writes ``benchmarks/results/coding.jsonl``.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard

from benchmarks.circumstances import circumstances
from benchmarks.real_vectors import keys_and_values
from tq_kernels import PRESETS, PageLayout
from tq_kernels.packing import unpack
from tq_kernels.reference import plane_view, quantize
from tq_store.coded import pack_coded, unpack_coded

RESULTS = Path(__file__).parent / "results" / "coding.jsonl"
NAMES = ("tq4", "tq3", "tq2", "k8v4")
LEVELS = (1, 3, 9)
LINKS = {
    "1 Gbit/s": 0.125,
    "5 Gbit/s": 0.625,
    "disk 1 GB/s": 1.0,
    "10 Gbit/s": 1.25,
    "disk 2 GB/s": 2.0,
    "25 Gbit/s": 3.125,
    "disk 3 GB/s": 3.0,
    "100 Gbit/s": 12.5,
}
"""GB/s."""
_PAGE_TOKENS = 128


def ideal_ratio(pages: torch.Tensor, layout: PageLayout) -> float:
    """Bytes after a perfect code of each index by itself, over bytes before."""
    saved = 0.0
    for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
        words = plane_view(pages, layout, f"{side}_words")
        signs = plane_view(pages, layout, f"{side}_signs") if layout.plane(f"{side}_signs") else None
        if side == "value":
            words, signs = words.transpose(-1, -2), None if signs is None else signs.transpose(-1, -2)
        counts = torch.bincount(unpack(words, signs, code).flatten(), minlength=1 << code.bits).double()
        shares = counts[counts > 0] / counts.sum()
        saved += float(counts.sum() * (code.bits + (shares * shares.log2()).sum())) / 8
    return 1 - saved / pages.numel()


def by_plane_ratio(pages: torch.Tensor, layout: PageLayout) -> float:
    """Level 1 over every kind of plane by itself."""
    compressor = zstandard.ZstdCompressor(level=1)
    planes = (plane_view(pages, layout, plane.name).contiguous() for plane in layout.planes)
    return sum(len(compressor.compress(plane.numpy().tobytes())) for plane in planes) / pages.numel()


def gbps(call: Callable[[], object], num_bytes: int, seconds: float) -> float:
    """Bytes a second of the fastest of many calls, which is what the core can do when left alone."""
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best / 1e9


def measure(
    source: str, name: str, pages: torch.Tensor, layout: PageLayout, seconds: float
) -> dict[str, Any]:
    """One row for blocks of one page of every layer: ``[blocks, page_bytes of a block]``."""
    block = pages.numpy().tobytes()
    ratios = {
        level: len(zstandard.ZstdCompressor(level=level).compress(block)) / len(block) for level in LEVELS
    }
    coded = pack_coded(block)
    return {
        "source": source,
        "preset": name,
        "block_bytes": len(block),
        "ideal": ideal_ratio(pages, layout),
        "by_plane": by_plane_ratio(pages, layout),
        **{f"level_{level}": ratio for level, ratio in ratios.items()},
        "pack_gbps": gbps(lambda: pack_coded(block), len(block), seconds),
        "unpack_gbps": gbps(lambda: unpack_coded(coded), len(block), seconds),
    }


def over_link(row: dict[str, Any], link_gbps: float) -> tuple[float, float]:
    """Speed-up of a fetch by coding: blocks that overlap with each other's decoding, and one block alone."""
    plain, coded, unpack = 1 / link_gbps, row["level_1"] / link_gbps, 1 / row["unpack_gbps"]
    return plain / max(coded, unpack), plain / (coded + unpack)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="of every speed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keys, values = keys_and_values("smollm2-135m-instruct", _PAGE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(2, 32, _PAGE_TOKENS, 8, 128, generator=generator)
    rows = []
    for source, (each_keys, each_values) in {"SmolLM2": (keys, values), "Gaussian": gaussian}.items():
        for name in NAMES:
            layout = PageLayout(
                spec=PRESETS[name],
                head_dim=each_keys.shape[-1],
                num_kv_heads=each_keys.shape[-2],
                page_tokens=_PAGE_TOKENS,
            )
            layers = zip(each_keys, each_values, strict=True)
            pages = torch.cat([quantize(key, value, layout) for key, value in layers])
            rows.append(measure(source, name, pages, layout, parsed.seconds))
    print("| pages | preset | ideal | level 1 | level 3 | level 9 | by plane | pack GB/s | unpack GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratios = " | ".join(
            f"{row[key]:.3f}" for key in ("ideal", "level_1", "level_3", "level_9", "by_plane")
        )
        speeds = f"{row['pack_gbps']:.2f} | {row['unpack_gbps']:.2f}"
        print(f"| {row['source']} | {row['preset']} | {ratios} | {speeds} |")
    chosen = next(row for row in rows if (row["source"], row["preset"]) == ("Gaussian", "tq4"))
    print("\n| tq4 over | fetches that overlap with decoding | one fetch, then decoding |\n|---|---|---|")
    for link, link_gbps in LINKS.items():
        overlapped, alone = over_link(chosen, link_gbps)
        print(f"| {link} | {overlapped:.2f}x | {alone:.2f}x |")
    facts = {**circumstances(), "zstandard": zstandard.__version__}
    parsed.output.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
