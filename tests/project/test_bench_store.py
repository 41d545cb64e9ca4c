"""The store's benchmark: it runs, its rows are what they should be, and its bars judge them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.store_load import Command, run
from benchmarks.store_processes import BenchmarkError, TqStore, Workers, output_of
from benchmarks.store_rows import KEYS, RESULTS, append_rows, check_row, read_rows

ROOT = Path(__file__).parents[2]
ROW = {
    "op": "get",
    "tier": "memory",
    "block_mib": 4.0,
    "clients": 1,
    "gib_per_s": 1.0,
    "p50_ms": 2.0,
    "p99_ms": 3.0,
    "peer": "redis-benchmark",
    "peer_gib_per_s": 1.25,
    "ratio": 0.8,
    "commit": "abc",
}


def test_a_quick_run_measures_every_operation_on_every_tier(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows(out)
    tiers = {"memory", "memory-shared", "redis", "redis-shared"}
    measured = {(row["op"], row["tier"]) for row in rows}
    assert measured >= {(op, tier) for op in ("get", "put", "load", "lookup") for tier in tiers}
    assert measured >= {(op, tier) for op in ("get", "load") for tier in ("memory-grpc", "redis-grpc")}
    assert measured >= {("resident", "memory"), ("stored-get", "memory"), ("stored-lookup", "memory")}
    for row in rows:
        assert set(KEYS) <= row.keys()
        assert row["note"].startswith("quick")
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        if row["op"] in ("get", "put"):
            assert row["peer"] in ("redis-benchmark", "memtier")
            assert row["ratio"] == pytest.approx(row["gib_per_s"] / row["peer_gib_per_s"])
    assert "bars, of this run" in done.stdout
    assert f"{len(rows)} rows added" in done.stdout


def test_the_help_teaches() -> None:
    text = store._parser().format_help()
    for word in ("--quick", "--lmcache-python", "memory-shared", "redis-benchmark", "about five minutes"):
        assert word in text


def test_rows_that_are_kept_are_sound() -> None:
    read_rows(RESULTS)


@pytest.mark.parametrize(
    "change", [{"op": None}, {"clients": 1.0}, {"ratio": 1}, {"more": 1}, {"p50_ms": None}]
)
def test_a_row_that_is_not_as_declared_is_not_written(tmp_path: Path, change: dict[str, object]) -> None:
    check_row(ROW)
    with pytest.raises(ValueError, match=r"row lacks|is .* not one of"):
        append_rows([ROW | change], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="row lacks"):
        check_row({"op": "get"})


def test_bars_say_what_was_reached_and_what_was_missed() -> None:
    rows = [
        ROW,
        ROW | {"tier": "redis", "ratio": 0.5},
        ROW | {"op": "lookup", "gib_per_s": None, "p50_ms": 2.5, "ratio": None, "peer": None},
        ROW | {"op": "stored-all", "ratio": 0.9, "stored_blocks": 1_000_000, "peer": "1000 stored"},
        ROW | {"op": "resident", "ratio": 1.2},
    ]
    lines = list(store.bars(rows))
    assert [line.split()[0] for line in lines] == ["reached", "MISSED", "MISSED", "reached", "MISSED"]
    assert "0.80 of redis-benchmark (at least 0.8)" in lines[0]


def test_a_worker_that_cannot_do_it_says_so() -> None:
    command = Command(
        op="get",
        address="127.0.0.1:1",
        block_bytes=4096,
        clients=[0],
        seconds=0.1,
        start_at=0.0,
        num_keys=1,
        with_pipes=True,
    )
    with Workers(1) as workers, pytest.raises(BenchmarkError, match=r"get at 127\.0\.0\.1:1: RpcUnavailable"):
        workers.run(command)


def test_a_miss_is_no_measurement(tmp_path: Path) -> None:
    with TqStore(tmp_path) as server:
        command = Command(
            op="get",
            address=server.address,
            block_bytes=4096,
            clients=[0],
            seconds=0.1,
            start_at=0.0,
            num_keys=4,
            with_pipes=False,
        )
        with pytest.raises(RuntimeError, match="is a miss"):
            run(command)


def test_what_cannot_start_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"tq-store did not start: .*memory.*; try: "):
        TqStore(tmp_path, "--memory-budget", "0")
    with pytest.raises(BenchmarkError, match="no such thing"):
        output_of([sys.executable, "-c", "raise SystemExit('no such thing')"])
