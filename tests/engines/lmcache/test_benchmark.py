"""The comparison of serdes: a row for each asked for, and one that fails takes no other with it."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import lmcache_serde
from benchmarks.lmcache_serdes import TQSerializer


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    numbers = np.random.default_rng(1).standard_normal((2, 2, 256, 2, 64), dtype=np.float32)
    np.save(tmp_path / "kv.npy", (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.int16))
    monkeypatch.setattr(lmcache_serde, "LARGE_HEADS", 1)

    def rows_of(*names: str) -> dict[str, dict[str, float]]:
        out = tmp_path / "rows.jsonl"
        where = ["--kv", str(tmp_path / "kv.npy"), "--out", str(out), "--commit", "0123abc"]
        lmcache_serde.main([*where, "--rates", "--repeats", "1", "--tokens", "64", "--only", *names])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return {row["serde"]: row for row in rows}

    return rows_of


def test_every_serde_asked_for_has_a_row(run):
    rows = run("naive", "fp8", "tq4 (cpu)")
    assert list(rows) == ["naive", "fp8", "tq4 (cpu)", "uniform 4 bits"]
    assert rows["naive"]["value_error"] == 0
    assert 0.08 < rows["tq4 (cpu)"]["value_error"] < 0.1
    assert 5 * rows["tq4 (cpu)"]["outlier_value_error"] < rows["uniform 4 bits"]["outlier_value_error"]
    assert rows["fp8"]["timed_tokens"] == 64
    assert rows["fp8"]["pack_mb_per_s"] > 0


def test_one_that_fails_leaves_the_others_their_rows(run, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(TQSerializer, "serialize", fail)
    assert list(run("fp8", "tq4 (cpu)")) == ["fp8", "uniform 4 bits"]
    assert "tq4 (cpu) failed: RuntimeError('no such kernel')" in capsys.readouterr().out
