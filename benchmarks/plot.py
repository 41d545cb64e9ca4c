"""Plot what decode attention gains over bf16, against the length of the context, for each preset.

    python -m benchmarks.plot                        results/gpu.jsonl to results/decode_speedup.svg and .png

The same rows give the same SVG bytes.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.registry import BF16
from benchmarks.rows import RESULTS, Row, read_rows
from tq_kernels import PRESETS

Points = dict[str, list[tuple[int, float]]]

_SHAPE = {"op": "decode", "batch": 32, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_tokens": 128}


def speedups(rows: Iterable[Row]) -> Points:
    """Contexts and speed-ups over the faster bf16 backend by preset, the presets in their own order."""
    points: Points = {name: [] for name in PRESETS}
    for row in rows:
        if row["baseline"] in BF16 and row["speedup"] and all(row.get(k) == v for k, v in _SHAPE.items()):
            points[row["preset"]].append((row["context"], row["speedup"]))
    return {name: sorted(pairs) for name, pairs in points.items() if pairs}


def draw(points: Points, title: str, paths: Sequence[Path]) -> None:
    """Write the plot to every path; its suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tq-store", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    contexts = sorted({context for pairs in points.values() for context, _ in pairs})
    for name, pairs in sorted(points.items(), key=lambda item: -item[1][-1][1]):
        style = "--" if name in ("fp8", "raw") else "-"
        axes.plot(*zip(*pairs, strict=True), style, marker="o", markersize=3.5, label=name)
    for height, label in ((1.0, "bf16"), (2.0, "FP8 at the same GB/s")):
        axes.axhline(height, color="0.6", linewidth=0.8, zorder=0)
        at_the_right = axes.get_yaxis_transform()
        axes.text(
            0.99, height, label, transform=at_the_right, ha="right", va="bottom", size="small", color="0.4"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("times as fast as bf16")
    axes.set_title(title, fontsize="medium")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the rows, draw, say where."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="where (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    rows = read_rows(parsed.rows)
    points = speedups(rows)
    if not points:
        print(
            f"{parsed.rows} has no decode rows at batch 32; `make bench-gpu` measures them", file=sys.stderr
        )
        return 1
    paths = [parsed.folder / f"decode_speedup.{suffix}" for suffix in ("svg", "png")]
    draw(points, f"decode attention, batch 32, 32 query over 8 KV heads, d = 128, {rows[0]['device']}", paths)
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
