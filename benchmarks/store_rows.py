"""Rows of `results/store.jsonl`: one operation on one tier against one peer, measured in the same run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import check_types

RESULTS = Path(__file__).parent / "results" / "store.jsonl"

Row = dict[str, Any]

_MAYBE_FLOAT = (float, type(None))
KEYS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "tier": (str,),
    "block_mib": (float,),
    "clients": (int,),
    "gib_per_s": _MAYBE_FLOAT,
    "p50_ms": (float,),
    "p99_ms": (float,),
    "peer": (str, type(None)),
    "peer_gib_per_s": _MAYBE_FLOAT,
    "ratio": _MAYBE_FLOAT,
    "commit": (str,),
}
"""Keys of every row. Times are of one call. `ratio` is our throughput over the peer's, but of lookups and of
`stored-…` it is the peer's time over ours, and of `resident` the peak over the budget. `cpu_s_per_gib` is
the processor time of our server and clients."""

OPTIONAL_KEYS: dict[str, tuple[type, ...]] = {
    "peer_p50_ms": _MAYBE_FLOAT,
    "cpu_s_per_gib": _MAYBE_FLOAT,
    "stored_blocks": (int,),
    "machine": (str,),
    "date": (str,),
    "note": (str,),
}


def check_row(row: Row) -> None:
    """Keys and types are those declared.

    Raises:
        ValueError: They are not; the message names the key.
    """
    check_types(row, KEYS, OPTIONAL_KEYS)


def append_rows(rows: Iterable[Row], path: Path) -> None:
    """Add rows at the end of a file, checked, one a line."""
    lines = []
    for row in rows:
        check_row(row)
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read_rows(path: Path = RESULTS) -> list[Row]:
    """All rows of a file, checked; none where there is no file."""
    if not path.exists():
        return []
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        check_row(row)
    return rows
