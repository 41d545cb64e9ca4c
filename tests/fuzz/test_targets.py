"""Every fuzz target for a moment, and proof that it would notice."""

import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from fuzz import driver, fuzz_block, fuzz_disk, fuzz_frames, fuzz_service
from fuzz.targets import TARGETS

from tq_store.block import BlockInfo, Buffer, verify_block
from tq_store.keys import BlockKey
from tq_store.rpc.frames import Frame

RUNS = {
    "block": (1_000, "sound NotABlock UnsupportedVersion LengthMismatch ChecksumMismatch"),
    "coded": (3_000, "sound NotABlock UnsupportedVersion LengthMismatch ChecksumMismatch InvalidHeader"),
    "frames": (4_000, "frame refused missing block broken"),
    "messages": (4_000, "message refused"),
    "redis": (3_000, "replies refused"),
    "cold": (100, "read refused"),
    "config": (500, "config refused"),
    "secrets": (1_000, "tokens tenants password stranger tenant entry refused"),
    "addresses": (10_000, "address local standalone sentinel cluster key peer table refused"),
    "documents": (3_000, "status model object layout refused"),
    "disk": (40, "block miss quarantined"),
    "pipes": (300, "opened refused slow block missing broken"),
    "service": (400, "slow raw Put Get Ping Stats GetShared nameless"),
}
"""Inputs, and the first words of outcomes that must be among those seen."""


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_and_every_part_is_reached(name: str) -> None:
    num_runs, expected = RUNS[name]
    seen = driver.fuzz(TARGETS[name], seed=20, keep_going=lambda runs: runs < num_runs)
    assert {what.split()[0] for what in seen} >= set(expected.split()), seen


def test_mutated_blocks_reach_every_part_of_the_parser_often() -> None:
    seen = driver.fuzz(fuzz_block, seed=20, keep_going=lambda runs: runs < 10_000)
    assert set(seen) == {
        "sound",
        "NotABlock",
        "UnsupportedVersion",
        "LengthMismatch",
        "ChecksumMismatch",
        "InvalidHeader",
    }
    assert min(seen.values()) > 200, seen


def test_an_exception_of_another_kind_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: Buffer, key: BlockKey | None = None) -> BlockInfo:
        raise struct.error("unpack requires a buffer of 256 bytes")

    monkeypatch.setattr(fuzz_block, "verify_block", careless)
    with pytest.raises(AssertionError, match=r"unpack requires.* on run 0 of seed 1, input "):
        driver.fuzz(fuzz_block, seed=1, keep_going=lambda runs: runs < 10)


def test_bytes_that_no_writer_produces_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    info = verify_block((fuzz_block.CORPUS / "block_v1_smallest.bin").read_bytes())
    monkeypatch.setattr(fuzz_block, "verify_block", lambda data, key=None: info)
    with pytest.raises(AssertionError, match=r"accepted|described"):
        driver.fuzz(fuzz_block, seed=1, keep_going=lambda runs: runs < 1000)


def test_a_frame_that_protobuf_reads_otherwise_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_frames, "parse_frame", lambda raw: Frame(index=7))
    with pytest.raises(AssertionError, match="not what protobuf reads"):
        driver.fuzz(fuzz_frames, seed=1, keep_going=lambda runs: runs < 100)


def test_a_damaged_file_that_is_served_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    async def trusting(blocks: object, verify: object = None) -> list[None]:
        return [None] * len(list(blocks))  # type: ignore[call-overload]

    monkeypatch.setattr("tq_store.tiering.tier.check_all", trusting)
    with pytest.raises(AssertionError, match=r"Mismatch|NotABlock|InvalidHeader|UnsupportedVersion"):
        driver.fuzz(fuzz_disk, seed=1, keep_going=lambda runs: runs < 100)


def test_a_server_that_blames_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(raw: bytes) -> list[BlockKey]:
        raise KeyError("keys")

    monkeypatch.setattr("tq_store.rpc.convert.parse_keys", careless)
    with pytest.raises(AssertionError, match=r"answered with StatusCode.INTERNAL"):
        driver.fuzz(fuzz_service, seed=1, keep_going=lambda runs: runs < 200)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"service"}))
def test_any_bytes_are_an_input(name: str) -> None:
    rng = random.Random(3)
    with TARGETS[name].opened() as feed:
        for size in (0, 1, 2, 3, 100, 5000):
            list(feed(rng.randbytes(size)))


def test_several_inputs_in_one_come_apart_again() -> None:
    items = [b"", b"a", bytes(1000)]
    assert driver.unpacked_list(driver.packed_list(items)) == items
    assert driver.unpacked_list(b"\x05\x00ab") == [b"ab"]


def test_the_same_seed_makes_the_same_inputs() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.inputs: list[bytes] = []

        def generate(self, rng: random.Random) -> bytes:
            return driver.mutated(rng, b"some bytes to begin with", [b"piece"])

        def opened(self) -> "Recorder":
            return self

        def __enter__(self) -> "Recorder":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, data: bytes) -> Iterable[str]:
            self.inputs.append(data)
            return ["seen"]

    first, second = Recorder(), Recorder()
    for each in (first, second):
        assert driver.fuzz(each, seed=4, keep_going=lambda runs: runs < 500) == Counter(seen=500)  # type: ignore[arg-type]
    assert first.inputs == second.inputs
    assert len(set(first.inputs)) > 300


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz", "--only", "block"]
    folder = Path(__file__).parent.parent

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    output = run("--seconds", "0.3", "--seed", "3")
    assert output.startswith("seed 3\nblock: ")
    assert "sound" in output
    (tmp_path / "input").write_bytes(b"no block")
    assert run("--", str(tmp_path / "input")).split()[1:] == ["NotABlock", "NotABlock"]
