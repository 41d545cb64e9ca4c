"""Rows of `results/quality.jsonl`: one method on one model under one set of circumstances."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"

Row = dict[str, Any]

KEYS = (
    *("model", "preset", "bytes_per_token", "bytes_per_token_bf16", "kl_mean", "kl_p99", "top1", "ppl"),
    *("ppl_ref", "worst_layer_corr", "tokens", "sinks", "commit"),
)
"""Keys that every row has, in this order, before any others. What was not measured is null."""

IDENTITY = ("measure", "model", "preset", "tokens", "texts", "sinks", "tail", "page_tokens", "state", "dtype")
"""What two rows have in common of which the later one replaces the other."""


def ordered(row: Row) -> Row:
    """The row with all of `KEYS`, in their order, first."""
    return {**{key: row.get(key) for key in KEYS}, **{k: v for k, v in row.items() if k not in KEYS}}


def read_rows(path: Path = RESULTS) -> list[Row]:
    """All rows of a file; none where there is no file.

    Raises:
        ValueError: A row does not begin with `KEYS`.
    """
    if not path.exists():
        return []
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if tuple(row)[: len(KEYS)] != KEYS:
            raise ValueError(f"a row of {path} does not begin with {', '.join(KEYS)}: {row}")
    return rows


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows less those that the new ones replace, then the new ones."""
    replaced = {identity(row) for row in new}
    return [row for row in old if identity(row) not in replaced] + list(new)


def identity(row: Row) -> tuple[Any, ...]:
    """What tells measurements apart."""
    return tuple(row.get(key) for key in IDENTITY)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(ordered(row)) + "\n" for row in rows), encoding="utf-8")
