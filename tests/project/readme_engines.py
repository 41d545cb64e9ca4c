"""The README's table of engines' decode times, made from `benchmarks/results/vllm.jsonl` and `sglang.jsonl`.

`python -m tests.project.readme_engines` rewrites it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_BEGIN = "<!-- engines: rewritten by `python -m tests.project.readme_engines` -->\n"
_END = "<!-- end of engines -->\n"
_SHAPES = ((1, 1024), (32, 4096), (32, 16384), (8, 32768))
_LAYERS = 8
_ENGINES = (
    ("vLLM", "vllm", "auto", "fp8", "tq4/128"),
    ("SGLang", "sglang", "auto", "fp8_e4m3", "tq4"),
)
"""Name, file, and the dtypes that are bf16, FP8 and ours."""

Row = dict[str, Any]


def table() -> str:
    """Markdown: for each engine the newest run that has all three dtypes at all shapes."""
    lines = [
        "| engine | batch x context | bf16, ms a token | FP8 | `tq4` | over bf16 | over FP8 |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, file, *dtypes in _ENGINES:
        run, row = _newest(_rows(file), dtypes)
        for batch, context in _SHAPES:
            bf16, fp8, ours = (run[dtype, batch, context]["tpot_ms"] for dtype in dtypes)
            lines.append(
                f"| {name} {row[file]} | {batch} x {context:,} | {bf16:.2f} | {fp8:.2f} | {ours:.2f} | "
                f"**{bf16 / ours:.2f}x** | {fp8 / ours:.2f}x |"
            )
        pool = row["pool_tokens"] / run[dtypes[0], *_SHAPES[0]]["pool_tokens"]
        page = "128-token pages" if "/" in dtypes[-1] else "64-token pages"
        notes.append(
            f"{name}: {page}, {pool:.2f}x the tokens of bf16 in the same memory, commit {row['commit']}"
        )
    return "\n".join(lines) + "\n\n" + "; ".join(notes) + f". {row['device']}.\n"


def _rows(file: str) -> list[Row]:
    lines = (ROOT / "benchmarks" / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if _is_plain_decode(row)]


def _is_plain_decode(row: Row) -> bool:
    """Whether a row is of one device, eight layers, a shape of the table, and an engine that only decodes."""
    if "model" in row:  # another one than that of the table
        return False
    is_alone = row.get("mode", "pages") in ("stock", "pages") and row.get("tp_size", 1) == 1
    is_shape = (row["batch"], row["context"]) in _SHAPES and row.get("layers", _LAYERS) == _LAYERS
    return is_alone and is_shape


def _newest(rows: Sequence[Row], dtypes: Sequence[str]) -> tuple[dict[Any, Row], Row]:
    """Rows of a run by dtype, batch and context, and one of ours among them."""
    commits = dict.fromkeys(row["commit"] for row in reversed(rows))
    for commit in commits:
        run = {
            (row["kv_cache_dtype"], row["batch"], row["context"]): row
            for row in rows
            if row["commit"] == commit and row["tpot_ms"] is not None
        }
        if all((dtype, *shape) in run for dtype in dtypes for shape in _SHAPES):
            return run, run[dtypes[-1], *_SHAPES[0]]
    raise LookupError(f"no run has {', '.join(dtypes)} at all shapes")


def parts() -> tuple[str, str, str]:
    """README before, within and after the table."""
    head, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    within, _, tail = rest.partition(_END)
    return head, within, tail


def main() -> None:
    """Rewrite the table."""
    head, _, tail = parts()
    README.write_text(head + _BEGIN + table() + _END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
