"""`python -m benchmarks.quality`: what a compressed KV cache costs a real model, method by method."""

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from benchmarks.quality.arguments import conditions_of, parse_arguments, retrieval_of
from benchmarks.quality.bars import judged
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.measure import (
    TEXT_METRICS,
    Advance,
    measure_ruler,
    measure_store,
    measure_texts,
)
from benchmarks.quality.methods.base import Method
from benchmarks.quality.methods.catalogue import QUICK, selected
from benchmarks.quality.models import LoadedModel, load_model
from benchmarks.quality.report import write_report
from benchmarks.quality.rows import Row, merged, read_rows, write_rows
from tq_store.errors import TQStoreError

_TASKS = {"niah_single_2": "single", "niah_multikey_1": "multikey", "vt": "vt", "qa_1": "qa"}
_COLUMNS = {
    "bytes_per_token": ("B/token", "{:.0f}"),
    "kl_mean": ("mean KL", "{:.4f}"),
    "kl_p99": ("p99 KL", "{:.3f}"),
    "top1": ("top-1", "{:.1%}"),
    "ppl": ("ppl", "{:.2f}"),
    "worst_layer_corr": ("corr", "{:.4f}"),
    "attention_kl": ("att KL", "{:.4f}"),
    "output_error": ("out err", "{:.4f}"),
}


class Bars:
    """Progress on a terminal's stderr; nothing elsewhere."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._title = title
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, metric: str, done: int, total: int) -> None:
        """Show that a metric has come so far."""
        if metric not in self._tasks:
            self._tasks[metric] = self._progress.add_task(f"{self._title}: {metric}", total=total)
        self._progress.update(self._tasks[metric], completed=done)


def print_scores(rows: Sequence[Row]) -> None:
    """One line a row of retrieval: scores in percent."""
    tasks = list(rows[0]["ruler"])
    print(f"{'method':22}{'tokens':>9}" + "".join(f"{_TASKS[task]:>9}" for task in tasks))
    for row in rows:
        print(
            f"{row['preset']:22}{row['tokens']:9}" + "".join(f"{row['ruler'][task]:9.1f}" for task in tasks)
        )


def print_rows(rows: Sequence[Row]) -> None:
    """One line a row, with the columns that were measured."""
    measured = {key for row in rows for key, value in row.items() if value is not None}
    columns = {key: column for key, column in _COLUMNS.items() if key in measured}
    print(f"{'method':22}{'x bf16':>9}" + "".join(f"{title:>9}" for title, _ in columns.values()))
    for row in rows:
        ratio = row["bytes_per_token_bf16"] / row["bytes_per_token"]
        cells = (form.format(row[key]) for key, (_, form) in columns.items())
        print(f"{row['preset']:22}{ratio:9.2f}" + "".join(f"{cell:>9}" for cell in cells))


def measured(
    loaded: LoadedModel,
    methods: Sequence[Method],
    conditions: Conditions,
    parsed: Namespace,
    advance: Advance,
) -> list[Row]:
    """Rows of all metrics that the command line asks for, on one model."""
    rows: list[Row] = []
    if set(TEXT_METRICS) & set(parsed.metrics):
        rows += measure_texts(loaded, methods, conditions, parsed.metrics, advance)
    if "store" in parsed.metrics:
        rows += measure_store(loaded, methods, conditions, advance)
    if "retrieval" in parsed.metrics:
        rows += measure_ruler(loaded, methods, conditions, retrieval_of(parsed), advance)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; exit status 2 for what cannot be measured."""
    parsed, console = parse_arguments(arguments), Console(stderr=True)
    transformers_logging.disable_progress_bar()
    conditions = conditions_of(parsed)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    device = torch.device(parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        methods = selected(conditions.page_tokens, parsed.only or (QUICK if parsed.quick else ()))
        if parsed.list:
            print(*(method.name for method in methods), sep="\n")
            return 0
        for name in parsed.model:
            loaded = load_model(name, device=device, dtype=getattr(torch, parsed.dtype))
            with Progress(*bars, console=console, disable=not console.is_terminal) as progress:
                advance = Bars(progress, loaded.name)
                rows = measured(loaded, methods, conditions, parsed, advance)
            print(
                f"{loaded.name}, {conditions.num_texts} x {conditions.num_tokens} tokens, "
                f"{conditions.num_sinks} sinks, tail of {conditions.tail}"
            )
            for measure, show in (("text", print_rows), ("store", print_rows), ("retrieval", print_scores)):
                if part := [row for row in rows if row["measure"] == measure]:
                    print(f"{measure}:")
                    show(part)
            print(*judged(rows), sep="\n")
            rows = merged(read_rows(parsed.output), rows)
            write_rows(rows, parsed.output)
            print("written:", parsed.output, *write_report(rows, parsed.output.parent))
    except (ValueError, OSError, TQStoreError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
