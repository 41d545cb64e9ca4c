"""Coded blocks come back as they were, and nothing else is taken for one."""

import hashlib
import random
import re
import struct
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from store.sample_blocks import sample_block

from tq_store.block import HEADER_BYTES, MAX_BLOCK_BYTES
from tq_store.coded import (
    CODED_HEADER_BYTES,
    CODED_LAYOUT,
    MAGIC,
    MAX_WINDOW_BYTES,
    is_coded,
    pack_coded,
    unpack_coded,
)
from tq_store.errors import (
    BlockFormatError,
    ChecksumMismatch,
    InvalidHeader,
    LengthMismatch,
    NotABlock,
    UnsupportedVersion,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_SHA256 = "6c6d02e7d763fb4c2af91651bf9bdf0adfd74a4aa192839be04e4fc4150fbf7b"


def nibbles(num_bytes: int, seed: int = 1) -> bytes:
    """Bytes of two codes each, unequally likely, like those of pages."""
    draw = random.Random(seed)
    codes = [min(int(abs(draw.gauss(0, 3))), 7) | draw.getrandbits(1) << 3 for _ in range(2 * num_bytes)]
    return bytes(a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True))


def sealed(data: bytes, **fields: int | bytes) -> bytes:
    """With other values in its header and a header checksum that agrees."""
    head = bytearray(data[:CODED_HEADER_BYTES])
    for name, value in fields.items():
        offset, code = CODED_LAYOUT[name]
        struct.pack_into("<" + code, head, offset, value)
    struct.pack_into("<Q", head, 48, xxhash.xxh3_64_intdigest(bytes(head[:48])))
    return bytes(head) + data[CODED_HEADER_BYTES:]


BLOCK = nibbles(5000)
CODED = pack_coded(BLOCK)


def with_frame(frame: bytes, raw_bytes: int) -> bytes:
    return sealed(CODED[:CODED_HEADER_BYTES] + frame, coded_bytes=len(frame), raw_bytes=raw_bytes)


def test_the_layout_has_no_gaps() -> None:
    offset = 0
    for place, code in CODED_LAYOUT.values():
        assert place == offset
        assert place % min(struct.calcsize("<" + code), 8) == 0
        offset += struct.calcsize("<" + code)
    assert offset == CODED_HEADER_BYTES == 56


def test_the_documented_table_is_the_layout() -> None:
    document = (Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md").read_text()
    section = document.partition("\n## Coded block\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", section, re.MULTILINE)
    assert {name: (int(offset), int(size)) for offset, size, name in rows} == {
        name: (offset, struct.calcsize("<" + code)) for name, (offset, code) in CODED_LAYOUT.items()
    }
    assert f"{HEADER_BYTES} to {MAX_BLOCK_BYTES:,}" in section
    assert f"`{MAGIC.hex(' ').upper()}`" in section
    assert f"window above {MAX_WINDOW_BYTES >> 20} MiB" in section


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=HEADER_BYTES, max_size=2000), st.integers(0, 40))
def test_any_block_comes_back(block: bytes, repeat: int) -> None:
    block *= 1 + repeat
    packed = pack_coded(memoryview(block))
    if is_coded(packed):
        assert len(packed) < len(block)
        assert unpack_coded(memoryview(packed)) == block
    else:
        assert packed == block


def test_codes_of_a_page_shrink_by_what_their_entropy_allows() -> None:
    block = nibbles(200_000)
    assert 0.8 < len(pack_coded(block)) / len(block) < 0.97


def test_bytes_that_do_not_shrink_are_stored_as_they_are() -> None:
    block = random.Random(2).randbytes(4096)
    assert pack_coded(block) == block


@pytest.mark.parametrize("size", [0, 5, 8, 55, 56, 300, len(CODED) - 1])
def test_what_is_cut_short_is_refused(size: int) -> None:
    with pytest.raises((LengthMismatch, NotABlock)):
        unpack_coded(CODED[:size])


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(LengthMismatch):
        unpack_coded(CODED + b"\0")
    with pytest.raises(ChecksumMismatch):
        unpack_coded(with_frame(CODED[CODED_HEADER_BYTES:] + b"\0", 5000))


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 8 * len(CODED) - 1))
def test_a_flipped_bit_is_found_or_changes_nothing(place: int) -> None:
    """A frame has a few bits that no decoder reads."""
    damaged = bytearray(CODED)
    damaged[place // 8] ^= 1 << place % 8
    try:
        assert unpack_coded(damaged) == BLOCK
        assert place >= 8 * CODED_HEADER_BYTES
    except BlockFormatError:
        pass


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["coder", "reserved", "raw_bytes", "coded_bytes", "format_version"]),
    value=st.integers(0, 2**64 - 1),
)
def test_no_sealed_field_may_lie(name: str, value: int) -> None:
    """Nothing is allocated by a length that was not checked: 2^64 bytes would show."""
    offset, code = CODED_LAYOUT[name]
    value %= 1 << 8 * struct.calcsize("<" + code)
    if struct.pack("<" + code, value) == CODED[offset : offset + struct.calcsize("<" + code)]:
        return
    with pytest.raises(BlockFormatError):
        unpack_coded(sealed(CODED, **{name: value}))


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        (b"\x89TQB" + CODED[4:], NotABlock),
        (sealed(CODED, format_version=2), UnsupportedVersion),
        (sealed(CODED, coder=2), UnsupportedVersion),
        (sealed(CODED, reserved=1), UnsupportedVersion),
        (sealed(CODED, raw_bytes=HEADER_BYTES - 1), InvalidHeader),
        (sealed(CODED, raw_bytes=MAX_BLOCK_BYTES + 1), InvalidHeader),
        (sealed(CODED, raw_bytes=5001), InvalidHeader),
        (sealed(CODED, raw_checksum=bytes(16)), ChecksumMismatch),
        (sealed(CODED, coded_bytes=3), LengthMismatch),
        (with_frame(b"no frame at all", 5000), ChecksumMismatch),
    ],
)
def test_each_damage_has_its_error(damaged: bytes, error: type[BlockFormatError]) -> None:
    with pytest.raises(error):
        unpack_coded(damaged)


def test_a_frame_that_would_take_much_memory_is_refused() -> None:
    """A window over the limit, no content size, or another one than the header's."""
    block = nibbles(5000)
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True, enable_ldm=True)
    chunks = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=40 << 20)
    frame = chunks.compress(bytes(40 << 20)) + chunks.flush()
    assert zstandard.get_frame_parameters(frame).window_size > MAX_WINDOW_BYTES
    with pytest.raises(InvalidHeader):
        unpack_coded(with_frame(frame, 40 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(block)
    with pytest.raises(InvalidHeader):
        unpack_coded(with_frame(unsized, 5000))


def test_golden_file_reads_as_it_did() -> None:
    """Its bytes may be written otherwise by another version of the library; they must stay readable."""
    data = (GOLDEN / "coded_v1.bin").read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    assert data[: len(MAGIC)] == MAGIC
    assert unpack_coded(data) == sample_block(7, payload_bytes=4096)[1][:256] + nibbles(4096, seed=7)
