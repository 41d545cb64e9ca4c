"""The block fuzzer for a few seconds, and proof that it would notice."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import fuzz_block

from tq_store.block import BlockInfo, Buffer, verify_block
from tq_store.keys import BlockKey


def test_mutated_blocks_are_rejected_or_sound() -> None:
    seen = fuzz_block.fuzz(seed=20, keep_going=lambda runs: runs < 25_000)

    # every outcome, or the mutations no longer reach some part of the parser
    assert set(seen) == {
        "sound",
        "NotABlock",
        "UnsupportedVersion",
        "LengthMismatch",
        "ChecksumMismatch",
        "InvalidHeader",
    }
    assert min(seen.values()) > 500, seen


def test_an_exception_of_another_kind_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: Buffer, key: BlockKey | None = None) -> BlockInfo:
        raise struct.error("unpack requires a buffer of 256 bytes")

    monkeypatch.setattr(fuzz_block, "verify_block", careless)

    with pytest.raises(AssertionError, match=r"unpack requires.* on run 0 of seed 1, input "):
        fuzz_block.fuzz(seed=1, keep_going=lambda runs: runs < 10)


def test_bytes_that_no_writer_produces_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    info = verify_block((fuzz_block.CORPUS / "block_v1_smallest.bin").read_bytes())
    monkeypatch.setattr(fuzz_block, "verify_block", lambda data, key=None: info)

    with pytest.raises(AssertionError, match="accepted"):
        fuzz_block.fuzz(seed=1, keep_going=lambda runs: runs < 1000)


def test_libfuzzer_entry_point_accepts_the_corpus_and_junk() -> None:
    for path in fuzz_block.CORPUS.iterdir():
        fuzz_block.TestOneInput(path.read_bytes())
    fuzz_block.TestOneInput(b"")


def test_command_line_runs_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, fuzz_block.__file__, "--seconds", "0.2", "--seed", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.startswith("seed 3, ")
    assert "sound" in done.stdout
