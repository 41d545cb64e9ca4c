"""The fuzzers of parsers and of the service for a few seconds, and proof that they would notice."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import fuzz_service, fuzz_wire

from tq_store.server.service import BlockStoreService

ALWAYS_TAKEN = {"token", "peer"}


@pytest.mark.parametrize("name", fuzz_wire.TARGETS)
def test_parsers_take_or_refuse(name: str) -> None:
    runs = 200 if name.endswith("_file") else 4000
    seen = fuzz_wire.fuzz(name, seed=20, keep_going=lambda done: done < runs)
    assert seen["taken"] > runs // 50
    assert seen["refused"] > runs // 50 or name in ALWAYS_TAKEN


def test_an_exception_of_another_kind_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> None:
        raise struct.error("unpack requires a buffer")

    target = fuzz_wire.Target(careless, [b"x"])
    monkeypatch.setitem(fuzz_wire.TARGETS, "keys", target)
    with pytest.raises(AssertionError, match=r"keys: .*unpack requires.* on run 0 of seed 1, input"):
        fuzz_wire.fuzz("keys", seed=1, keep_going=lambda runs: runs < 10)


def test_a_service_under_fire_stays_whole_and_honest(tmp_path: Path) -> None:
    seen = fuzz_service.fuzz(tmp_path, seed=20, keep_going=lambda calls: calls < 500)
    kinds = {what.partition(" ")[0] for what in seen}
    assert kinds == {"malformed", "frames", "oversized", "slow", "shape", "raw"}
    assert seen["malformed INVALID_ARGUMENT"] > 50
    assert seen["frames INVALID_ARGUMENT"] > 50


def test_a_fault_of_the_service_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def careless(*_: object) -> bytes:
        raise KeyError("a request that nobody thought of")

    monkeypatch.setattr(BlockStoreService, "_lookup", careless)
    with pytest.raises(AssertionError, match=r"malformed ended with INTERNAL; call \d+ of seed 1"):
        fuzz_service.fuzz(tmp_path, seed=1, keep_going=lambda calls: calls < 200)


@pytest.mark.parametrize("arguments", [["fuzz/fuzz_wire.py", "--target", "frame"], ["fuzz/fuzz_service.py"]])
def test_command_lines_run_from_any_directory(tmp_path: Path, arguments: list[str]) -> None:
    script, *options = arguments
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / script, "--seconds", "0.2", "--seed", "3", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("seed 3, ")
