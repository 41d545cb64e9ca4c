"""One HTML page and one SVG out of measured rows.

    python -m benchmarks.quality.report             results/quality.jsonl to quality.html and quality.svg

The same rows give the same bytes.
"""

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.bars import judged
from benchmarks.quality.groups import FAMILIES, bits_per_value, grouped, main_groups
from benchmarks.quality.plots import correlation_by_layer, loss_against_size
from benchmarks.quality.rows import RESULTS, Row, read_rows

_COLUMNS: dict[str, tuple[str, str]] = {
    "bytes_per_token": ("bytes a token", "{:,.0f}"),
    "kl_mean": ("mean KL", "{:.4f}"),
    "kl_se": ("+-", "{:.4f}"),
    "kl_median": ("median KL", "{:.4f}"),
    "kl_p99": ("p99 KL", "{:.3f}"),
    "kl_max": ("max KL", "{:.2f}"),
    "top1": ("top-1", "{:.1%}"),
    "ppl": ("perplexity", "{:.2f}"),
    "ppl_ratio": ("over none", "{:.4f}"),
    "ppl_ratio_se": ("+-", "{:.4f}"),
    "worst_layer_corr": ("worst layer corr", "{:.4f}"),
    "worst_head_corr": ("worst head corr", "{:.4f}"),
    "attention_kl": ("attention KL", "{:.4f}"),
    "output_error": ("output error", "{:.4f}"),
    "key_mse": ("key error", "{:.4f}"),
    "value_mse": ("value error", "{:.4f}"),
}
_CODEC_KINDS = ("gaussian", "sparse", "outlier", "offset")
_SHOWN_BY_LAYER = ("fp8", "vllm-4bit_nc-all", "vllm-3bit_nc-all", "kivi4", "tq4", "tq3")
_LEAST_BASE = 60
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #999 }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto } .note { color: #666; font-size: 13px }
"""


def page(rows: Sequence[Row]) -> str:
    """The report, as one file without anything outside it."""
    parts = ["<h1>Quality per byte</h1>", _legend()]
    main = main_groups(rows, "text")
    parts.append(_inline(loss_against_size(main, "kl_mean", "mean KL of logits, nats")))
    if inside := _inline(loss_against_size(main, "attention_kl", "mean KL of attention, nats")):
        by_layer = _inline(correlation_by_layer(main, _SHOWN_BY_LAYER))
        parts += ["<h2>Inside the layers</h2>", inside, by_layer]
    if verdicts := list(judged(rows)):
        parts.append(f"<h2>What was to be reached</h2><pre>{html.escape(chr(10).join(verdicts))}</pre>")
    for group in grouped(rows, "text").values():
        parts += _text_section(group)
    for group in grouped(rows, "store").values():
        parts += _store_section(group)
    for model in dict.fromkeys(row["model"] for row in rows if row["measure"] == "retrieval"):
        scored = [row for row in rows if row["measure"] == "retrieval" and row["model"] == model]
        parts += _retrieval_section(model, scored)
    head = f'<meta charset="utf-8"><title>Quality per byte</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _inline(svg: str) -> str:
    """The picture without the prolog that only a file of its own has."""
    return svg[max(0, svg.find("<svg")) :]


def _legend() -> str:
    kinds = "".join(f"<li><b>{name}</b>: {html.escape(text)}</li>" for name, text in FAMILIES.items())
    return (
        "<p>What each way of keeping keys and values costs a real model, every token read from its "
        "compressed form at every layer and position, with the same raw first tokens for all. KL is of "
        "next-token probabilities against the uncompressed run; sizes are real bytes: codes, scales, "
        "centres, padding, headers, and the share of the raw tokens. Models are dequantised 4-bit weights."
        f"</p><ul>{kinds}</ul>"
    )


def _text_section(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    title = f"{first['model']}: {first['texts']} x {first['tokens']} tokens, {first['sinks']} raw sinks"
    if first["tail"]:
        title += f", raw tail of {first['tail']}"
    ordered = sorted(rows, key=lambda row: -row["bytes_per_token"])
    parts = [f"<h2>{html.escape(title)}</h2>", _table(ordered, _COLUMNS)]
    if any(row.get("codec_key_gaussian") is not None for row in rows):
        columns = {
            f"codec_{side}_{kind}": (f"{side}, {kind}", "{:.5f}")
            for side in ("key", "value")
            for kind in _CODEC_KINDS
        }
        parts += ["<h3>Squared error on made-up vectors</h3>", _table(ordered, columns)]
    return [*parts, *_notes(rows)]


def _store_section(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    title = f"{first['model']}: decoded on blocks from a store, {first['texts']} x {first['tokens']} tokens"
    about = (
        "One replica prefilled the first half of each text and saved its blocks to a running tq-store over "
        "gRPC; another fetched them and decoded the second half token by token, attending on their bytes. "
        "Its own newest tokens are raw until they fill a page, so numbers are lower than above."
    )
    ordered = sorted(rows, key=lambda row: -row["bytes_per_token"])
    columns = {**_COLUMNS, "blocks": ("blocks fetched", "{}")}
    return [f"<h2>{html.escape(title)}</h2><p>{about}</p>", _table(ordered, columns), *_notes(rows)]


def _retrieval_section(model: str, rows: Sequence[Row]) -> list[str]:
    """Scores by task and length; those where bf16 itself scores 60 or less say nothing and are grey."""
    lengths = sorted({row["tokens"] for row in rows})
    tasks = list(dict.fromkeys(task for row in rows for task in row["ruler"]))
    cells = [(task, length) for task in tasks for length in lengths]
    scores = {(row["preset"], row["tokens"], task): row["ruler"].get(task) for row in rows for task in tasks}
    header = "".join(f"<th>{html.escape(task)}, {length:,}</th>" for task, length in cells)
    lines = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        line = f"<td>{html.escape(preset)}</td>"
        for task, length in cells:
            value, base = scores.get((preset, length, task)), scores.get(("bf16", length, task))
            kind = ' class="note"' if base is not None and base <= _LEAST_BASE else ""
            line += f"<td{kind}>{'' if value is None else f'{value:.1f}'}</td>"
        lines.append(f"<tr>{line}</tr>")
    samples = " or ".join(str(count) for count in sorted({row["samples"] for row in rows}))
    about = f"Percent, {samples} samples each. Grey: bf16 itself scores {_LEAST_BASE} or less."
    return [
        f"<h2>{html.escape(model)}: RULER</h2><p>{about}</p>",
        _wide_table(f"<th>method</th>{header}", lines),
        *_notes(rows),
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Circumstances of rows, each once."""
    facts = {
        f"state from {row['state']}; {row['dtype']} on {row['device']}, {row['machine']}; "
        f"torch {row['torch']}, transformers {row['transformers']}; commit {row['commit']}"
        for row in rows
    }
    return [f'<p class="note">{html.escape(fact)}</p>' for fact in sorted(facts)]


def _table(rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> str:
    shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    titles = ("method", "bits", "x bf16", *(title for title, _ in shown.values()))
    lines = []
    for row in rows:
        bits = bits_per_value(row)
        cells = [row["preset"], f"{bits:.2f}", f"{16 / bits:.2f}"]
        cells += ["" if row.get(key) is None else form.format(row[key]) for key, (_, form) in shown.items()]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{title}</th>" for title in titles)
    return _wide_table(header, lines)


def _wide_table(header: str, lines: Sequence[str]) -> str:
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead>{body}</table></div>'


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write quality.html, and quality.svg where logits were measured; returns what was written."""
    paths = [folder / "quality.html"]
    paths[0].write_text(page(rows), encoding="utf-8")
    if svg := loss_against_size(main_groups(rows, "text"), "kl_mean", "mean KL of logits, nats"):
        paths.append(folder / "quality.svg")
        paths[1].write_text(svg, encoding="utf-8")
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the rows, write the report, say where."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="where (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    rows = read_rows(parsed.rows)
    if not rows:
        print(f"{parsed.rows} has no rows; `python -m benchmarks.quality` measures some", file=sys.stderr)
        return 1
    print(*write_report(rows, parsed.folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
