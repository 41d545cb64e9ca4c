"""Rows of `results/gpu.jsonl`: one op at one shape against one baseline, in microseconds.

`python -m benchmarks.rows FILE` takes the rows of a run on another machine over into it.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"

Row = dict[str, Any]

KEYS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "preset": (str,),
    "batch": (int,),
    "context": (int,),
    "q_heads": (int,),
    "kv_heads": (int,),
    "head_dim": (int,),
    "median_us": (float,),
    "gbps": (float,),
    "roofline": (float,),
    "baseline": (str,),
    "baseline_us": (float, type(None)),
    "speedup": (float, type(None)),
    "device": (str,),
    "torch": (str,),
    "triton": (str,),
    "commit": (str,),
}
"""Keys of every row. `gbps` counts the bytes that must move once; `roofline` is the least time the device
needs for those bytes or for the arithmetic, over the median; a baseline that gave no time has None."""

OPTIONAL_KEYS: dict[str, tuple[type, ...]] = {"page_tokens": (int,), "new_tokens": (int,), "note": (str,)}

Types = Mapping[str, tuple[type, ...]]
"""What a value may be, by key."""

_IDENTITY = (
    "op",
    "preset",
    "batch",
    "context",
    "q_heads",
    "kv_heads",
    "head_dim",
    "page_tokens",
    "new_tokens",
)


def check_types(row: Row, keys: Types, optional_keys: Types) -> None:
    """Keys and types of a row of any benchmark are those declared.

    Raises:
        ValueError: They are not; the message names the key.
    """
    allowed = {**keys, **optional_keys}
    unknown = sorted(row.keys() - allowed.keys())
    missing = sorted(keys.keys() - row.keys())
    if unknown or missing:
        raise ValueError(f"row lacks {missing} and has unknown {unknown}: {row}")
    for key, value in row.items():
        if type(value) not in allowed[key]:
            raise ValueError(f"{key} is {value!r}, not one of {allowed[key]}")


def check_row(row: Row) -> None:
    """Keys and types are those declared, and the numbers agree with each other.

    Raises:
        ValueError: They do not; the message names the key.
    """
    check_types(row, KEYS, OPTIONAL_KEYS)
    if row["median_us"] <= 0:
        raise ValueError(f"median_us is {row['median_us']}: a time is positive")
    if (row["baseline_us"] is None) != (row["speedup"] is None):
        raise ValueError(f"baseline_us and speedup are there together or not at all: {row}")
    if row["speedup"] is not None and abs(row["speedup"] * row["median_us"] / row["baseline_us"] - 1) > 0.01:
        raise ValueError(f"speedup is not baseline_us / median_us: {row}")


def identity(row: Row) -> tuple[object, ...]:
    """What two rows about the same configuration have in common, whatever the baseline."""
    return tuple(row.get(key) for key in _IDENTITY)


def read_rows(path: Path = RESULTS) -> list[Row]:
    """All rows of a file, checked; none where there is no file."""
    if not path.exists():
        return []
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        check_row(row)
    return rows


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows, checked, one a line."""
    lines = []
    for row in rows:
        check_row(row)
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The old rows with those of newly measured configurations replaced, the new ones last."""
    new = list(new)
    measured = {identity(row) for row in new}
    return [row for row in old if identity(row) not in measured] + new


def main(arguments: Sequence[str] | None = None) -> None:
    """Take rows over; those of other configurations stay, unless told otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=main.__doc__)
    parser.add_argument("file", type=Path, help="JSON lines written by `python -m benchmarks.run --out`")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="drop all rows that are there")
    parsed = parser.parse_args(arguments)
    rows = read_rows(parsed.file)
    write_rows(rows if parsed.replace else merged(read_rows(parsed.into), rows), parsed.into)
    print(f"{len(rows)} rows taken over into {parsed.into}")


if __name__ == "__main__":
    main()
