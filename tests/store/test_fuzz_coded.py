"""The fuzzer of coded blocks for a few seconds, and proof that it would notice."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import fuzz_coded

from tq_store.block import Buffer


def test_mutated_coded_blocks_are_rejected_or_sound() -> None:
    seen = fuzz_coded.fuzz(seed=20, keep_going=lambda runs: runs < 10_000)

    # every outcome, or the mutations no longer reach some part of the reader
    assert set(seen) == {
        "sound",
        "NotABlock",
        "UnsupportedVersion",
        "LengthMismatch",
        "ChecksumMismatch",
        "InvalidHeader",
    }
    assert min(seen.values()) > 50, seen


def test_an_exception_of_another_kind_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: Buffer) -> bytes:
        raise struct.error("unpack requires a buffer of 56 bytes")

    monkeypatch.setattr(fuzz_coded, "unpack_coded", careless)
    with pytest.raises(AssertionError, match=r"unpack requires.* on run 0 of seed 1, input "):
        fuzz_coded.fuzz(seed=1, keep_going=lambda runs: runs < 10)


def test_libfuzzer_entry_point_accepts_the_golden_file_and_junk() -> None:
    fuzz_coded.TestOneInput(fuzz_coded.GOLDEN.read_bytes())
    fuzz_coded.TestOneInput(b"")


def test_command_line_runs_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, fuzz_coded.__file__, "--seconds", "0.2", "--seed", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("seed 3, ")
