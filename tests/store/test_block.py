"""Block format v1: what a writer writes, and that a reader refuses everything else with the right error."""

import dataclasses
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from fuzz.fuzz_block import sealed
from hypothesis import given
from hypothesis import strategies as st
from store.block_document import DOCUMENT, ROWS, SPAN, Row, with_bit_flipped, with_fields
from store.strategies import block_infos, blocks, digests, payloads

from tq_store import errors
from tq_store.block import (
    HEADER_BYTES,
    HEADER_LAYOUT,
    MAGIC,
    MAX_PAYLOAD_BYTES,
    BlockInfo,
    pack_block,
    pack_header,
    parse_header,
    payload_of,
    verify_block,
)
from tq_store.errors import (
    BlockFormatError,
    ChecksumMismatch,
    IdentityMismatch,
    InvalidHeader,
    LengthMismatch,
    NotABlock,
    UnsupportedVersion,
)
from tq_store.keys import BlockKey

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = (GOLDEN / "block_v1_typical.bin").read_bytes()
INFO = verify_block(BLOCK)


def replaced(info: BlockInfo, **values: Any) -> BlockInfo:
    return dataclasses.replace(info, **values)


def refusal(data: bytes, key: BlockKey | None = None) -> type[BlockFormatError]:
    with pytest.raises(BlockFormatError) as caught:
        verify_block(data, key)
    assert str(caught.value)
    return caught.type


@given(blocks())
def test_what_was_written_is_read(written: tuple[BlockInfo, bytes]) -> None:
    info, block = written

    assert verify_block(block, info.key) == verify_block(block) == parse_header(block) == info
    assert info.key == info.namespace + info.prefix_hash
    assert len(block) == HEADER_BYTES + info.payload_bytes
    assert pack_block(info, payload_of(block)) == block
    assert sealed(block) == block


@given(st.data())
def test_every_kind_of_buffer_gives_the_same_bytes(data: st.DataObject) -> None:
    info = data.draw(block_infos())
    payload = data.draw(payloads(info))
    window = memoryview(b"before" + payload + b"after")[6 : 6 + len(payload)]
    kinds = (payload, bytearray(payload), memoryview(payload), memoryview(bytearray(payload)), window)

    assert len({pack_header(info, kind) for kind in kinds}) == 1
    for kind in kinds:
        block = pack_block(info, kind)
        assert type(block) is bytes
        assert block == pack_header(info, payload) + payload
        assert verify_block(bytearray(block)) == verify_block(memoryview(block)) == info
        assert payload_of(bytearray(block)) == payload_of(memoryview(block)) == payload


def test_payload_order_is_layers_then_pages() -> None:
    """The documented offset of each page, by writing its layer and number into it."""
    pages = {(layer, page): bytes([layer, page]) * 192 for layer in range(3) for page in range(2)}
    block = pack_block(INFO, b"".join(pages.values()))

    assert (INFO.num_layers, INFO.pages_per_layer, INFO.page_bytes) == (3, 2, 384)
    for (layer, page), content in pages.items():
        start = 256 + (layer * 2 + page) * 384
        assert block[start : start + 384] == content


@given(block_infos(), st.integers(-300, 300).filter(bool))
def test_a_payload_that_contradicts_the_geometry_is_not_written(info: BlockInfo, off_by: int) -> None:
    payload = bytes(max(0, info.payload_bytes + off_by))
    for pack in (pack_header, pack_block):
        with pytest.raises(LengthMismatch, match=f"{len(payload)} bytes.* {info.payload_bytes}$"):
            pack(info, payload)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_flipped_header_bit_is_refused_with_the_documented_error(row: Row) -> None:
    expected = getattr(errors, row.flipped)
    span = row.span
    for bit in range(8 * span.start, 8 * span.stop):
        damaged = with_bit_flipped(BLOCK, bit)
        assert refusal(damaged) is refusal(damaged, INFO.key) is expected
        with pytest.raises(expected):
            parse_header(damaged[:HEADER_BYTES])


@given(blocks(), st.data())
def test_any_flipped_payload_bit_is_refused(written: tuple[BlockInfo, bytes], data: st.DataObject) -> None:
    info, block = written
    bit = data.draw(st.integers(8 * HEADER_BYTES, 8 * len(block) - 1))

    assert refusal(with_bit_flipped(block, bit), info.key) is ChecksumMismatch
    assert parse_header(with_bit_flipped(block, bit)) == info


@given(blocks(), st.data())
def test_any_flipped_header_bit_of_any_block_is_refused(
    written: tuple[BlockInfo, bytes], data: st.DataObject
) -> None:
    info, block = written
    bit = data.draw(st.integers(0, 8 * HEADER_BYTES - 1))
    (row,) = (row for row in ROWS if row.span.start <= bit // 8 < row.span.stop)

    assert refusal(with_bit_flipped(block, bit), info.key).__name__ == row.flipped


def test_every_shorter_header_is_a_wrong_length() -> None:
    for length in range(HEADER_BYTES):
        assert refusal(BLOCK[:length]) is LengthMismatch
        with pytest.raises(LengthMismatch):
            parse_header(BLOCK[:length])


def test_a_short_input_that_is_no_block_is_not_called_a_truncated_one() -> None:
    for length in range(1, 8):
        assert refusal(b"HTTP/1.1"[:length]) is NotABlock
        assert refusal(MAGIC[: length - 1] + b"?") is NotABlock


@given(blocks(), st.data())
def test_every_shorter_payload_is_a_wrong_length(
    written: tuple[BlockInfo, bytes], data: st.DataObject
) -> None:
    info, block = written
    length = data.draw(st.integers(HEADER_BYTES, len(block) - 1))

    assert refusal(block[:length], info.key) is LengthMismatch
    # a length that a careless repair made agree is refused by the geometry
    assert refusal(sealed(with_fields(block[:length], payload_bytes=length - 256))) is InvalidHeader


@given(blocks(), st.binary(min_size=1, max_size=600))
def test_appended_bytes_are_a_wrong_length(written: tuple[BlockInfo, bytes], extra: bytes) -> None:
    info, block = written

    assert refusal(block + extra, info.key) is LengthMismatch
    assert (
        refusal(sealed(with_fields(block + extra, payload_bytes=len(block + extra) - 256))) is InvalidHeader
    )


Changes = dict[str, int | bytes]
WRONG_BUT_SEALED: list[tuple[Changes, type[BlockFormatError]]] = [
    ({"magic": b"\x89TQB\n\x1a\n\n"}, NotABlock),
    ({"format_version": 0}, UnsupportedVersion),
    ({"format_version": 2}, UnsupportedVersion),
    ({"format_version": 65535}, UnsupportedVersion),
    ({"format_version": 0x0100}, UnsupportedVersion),
    ({"header_bytes": 0}, InvalidHeader),
    ({"header_bytes": 255}, InvalidHeader),
    ({"header_bytes": 65535}, InvalidHeader),
    *((Changes(flags=1 << bit), UnsupportedVersion) for bit in range(32)),
    *((Changes(reserved=bytes(at) + b"\x80" + bytes(71 - at)), UnsupportedVersion) for at in range(72)),
    ({"payload_bytes": 0}, InvalidHeader),
    ({"payload_bytes": INFO.payload_bytes + 1}, InvalidHeader),
    ({"payload_bytes": 2**64 - 1}, InvalidHeader),
    ({"page_bytes": 0}, InvalidHeader),
    ({"page_bytes": 0, "payload_bytes": 0}, InvalidHeader),
    ({"page_bytes": 385, "payload_bytes": 385 * 6}, InvalidHeader),
    ({"page_bytes": 2**32 - 4}, InvalidHeader),
    ({"num_tokens": 0}, InvalidHeader),
    ({"num_tokens": 0, "payload_bytes": 0}, InvalidHeader),
    ({"num_tokens": 129}, InvalidHeader),
    ({"num_tokens": 192}, InvalidHeader),
    ({"page_tokens": 0}, InvalidHeader),
    ({"page_tokens": 60}, InvalidHeader),
    ({"page_tokens": 32}, InvalidHeader),
    ({"page_tokens": 256}, InvalidHeader),
    ({"head_dim": 0}, InvalidHeader),
    ({"num_layers": 0}, InvalidHeader),
    ({"num_layers": 0, "payload_bytes": 0}, InvalidHeader),
    ({"num_layers": 4}, InvalidHeader),
    ({"num_kv_heads": 0}, InvalidHeader),
    ({"num_kv_heads": 5}, InvalidHeader),
    ({"num_kv_heads": 8}, InvalidHeader),
    ({"first_kv_head": 5}, InvalidHeader),
    ({"first_kv_head": 65535}, InvalidHeader),
    ({"total_kv_heads": 5}, InvalidHeader),
    ({"total_kv_heads": 0}, InvalidHeader),
    ({"namespace": bytes(32)}, IdentityMismatch),
    ({"prefix_hash": bytes(32)}, IdentityMismatch),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG_BUT_SEALED, ids=lambda case: str(case)[:60])
def test_a_wrong_value_under_a_right_checksum_is_refused(
    changes: Changes, expected: type[BlockFormatError]
) -> None:
    assert refusal(sealed(with_fields(BLOCK, **changes)), INFO.key) is expected


def test_the_documented_errors_of_wrong_values_are_the_tested_ones() -> None:
    tested = {next(iter(changes)): kind.__name__ for changes, kind in WRONG_BUT_SEALED if len(changes) == 1}
    # the checksums themselves: the test below, and the flipped bits above
    tested |= {"payload_checksum": "ChecksumMismatch", "header_checksum": "ChecksumMismatch"}

    assert {row.name: row.wrong for row in ROWS if row.wrong != "any"} == tested


def test_a_wrong_payload_checksum_under_a_right_header_checksum_is_refused() -> None:
    right = BLOCK[SPAN["payload_checksum"]]
    for wrong in (bytes(16), right[::-1], *(with_bit_flipped(right, bit) for bit in range(128))):
        head = with_fields(BLOCK, payload_checksum=wrong)[:248]
        block = with_fields(head + BLOCK[248:], header_checksum=xxhash.xxh3_64_intdigest(head))

        assert refusal(block) is ChecksumMismatch
        assert parse_header(block) == INFO


@pytest.mark.parametrize("row", [row for row in ROWS if row.wrong == "any"], ids=lambda row: row.name)
def test_a_field_without_a_rule_takes_any_value_and_changes_nothing_else(row: Row) -> None:
    name = row.name
    for byte in (0x00, 0x01, 0xFF):
        raw = bytes([byte]) * row.size
        value = raw if isinstance(getattr(INFO, name), bytes) else int.from_bytes(raw, "little")

        info = verify_block(sealed(with_fields(BLOCK, **{name: raw})), INFO.key)

        assert info == replaced(INFO, **{name: value})


@given(blocks(), digests, digests)
def test_a_sound_block_under_another_key_is_refused(
    written: tuple[BlockInfo, bytes], namespace: bytes, prefix_hash: bytes
) -> None:
    info, block = written
    other = with_bit_flipped(info.key, 0)
    for key in (namespace + info.prefix_hash, info.namespace + prefix_hash, namespace + prefix_hash, other):
        if key != info.key:
            assert refusal(block, BlockKey(key)) is IdentityMismatch


def test_a_key_that_differs_in_any_bit_is_another() -> None:
    for bit in range(8 * len(INFO.key)):
        assert refusal(BLOCK, BlockKey(with_bit_flipped(INFO.key, bit))) is IdentityMismatch


STEPS: list[tuple[type[BlockFormatError], Callable[[bytes], bytes]]] = [
    (NotABlock, lambda block: with_fields(block, magic=bytes(8))),
    (LengthMismatch, lambda block: block[:255]),
    (UnsupportedVersion, lambda block: with_fields(block, format_version=2)),
    (ChecksumMismatch, lambda block: with_bit_flipped(block, 8 * 250)),
    (UnsupportedVersion, lambda block: sealed(with_fields(block, flags=1))),
    (InvalidHeader, lambda block: sealed(with_fields(block, num_layers=0))),
    (LengthMismatch, lambda block: block + b"more"),
    (ChecksumMismatch, lambda block: block[:256] + with_bit_flipped(block[256:], 0)),
    (IdentityMismatch, lambda block: block),
]


@pytest.mark.parametrize("first", range(len(STEPS)))
def test_of_several_faults_the_first_in_reading_order_is_reported(first: int) -> None:
    block = BLOCK
    for _, spoil in reversed(STEPS[first:]):
        block = spoil(block)

    assert refusal(block, BlockKey(bytes(64))) is STEPS[first][0]


def test_the_documented_reading_order_is_the_tested_one() -> None:
    documented = re.findall(r"^\d\. .*?Otherwise `(\w+)`", DOCUMENT, re.MULTILINE)
    assert documented == [kind.__name__ for kind, _ in STEPS]


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory held by Python objects during the action, beyond what was held before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"payload_bytes": 2**64 - 1},
        {"num_layers": 65535, "num_tokens": 2**32 - 1, "page_tokens": 1, "page_bytes": 2**32 - 4},
        # 2**64 bytes, which 64-bit arithmetic would take for none
        {"num_layers": 4, "num_tokens": 2**31, "page_tokens": 1, "page_bytes": 2**31, "payload_bytes": 0},
        {"num_layers": 1, "num_tokens": 64, "page_bytes": 2**28 + 4, "payload_bytes": 2**28 + 4},
    ],
    ids=["length", "largest", "wrapping product", "one over the limit"],
)
def test_a_huge_declared_payload_is_refused_without_allocating_it(changes: dict[str, int]) -> None:
    block = sealed(with_fields(BLOCK, **changes))

    assert peak_bytes(lambda: refusal(block)) < 1 << 18
    assert refusal(block) is InvalidHeader


def test_the_largest_payload_is_allowed_but_has_to_be_there() -> None:
    changes = {"num_layers": 1, "num_tokens": 64, "page_bytes": 2**28, "payload_bytes": 2**28}
    block = sealed(with_fields(BLOCK, **changes))

    assert parse_header(block).payload_bytes == MAX_PAYLOAD_BYTES
    assert refusal(block) is LengthMismatch
    assert peak_bytes(lambda: refusal(block)) < 1 << 18


def test_reading_and_writing_a_header_copies_no_payload() -> None:
    info = replaced(INFO, page_bytes=1 << 20)
    payload = bytearray(info.payload_bytes)
    block = bytearray(pack_block(info, payload))

    assert peak_bytes(lambda: (pack_header(info, payload), verify_block(block, info.key))) < 1 << 16
    assert payload_of(block).obj is block


FIELD_LIMITS = {
    name: 1 << 8 * struct.calcsize("<" + code)
    for name, (_, code) in HEADER_LAYOUT.items()
    if isinstance(getattr(INFO, name, None), int) and name != "payload_bytes"
}


@pytest.mark.parametrize(("name", "limit"), FIELD_LIMITS.items())
def test_a_number_that_its_field_cannot_hold_makes_no_info(name: str, limit: int) -> None:
    for value in (-1, limit, limit << 64):
        with pytest.raises(InvalidHeader, match=rf"^{name} is {value}, outside \[0, {limit}\)"):
            replaced(INFO, **{name: value})


@pytest.mark.parametrize("name", ["namespace", "prefix_hash", "codec_fingerprint"])
def test_a_digest_of_another_length_makes_no_info(name: str) -> None:
    for length in (0, 31, 33, 64):
        with pytest.raises(InvalidHeader, match=f"{name} must have 32 bytes, not {length}"):
            replaced(INFO, **{name: bytes(length)})


@given(st.binary(max_size=600))
def test_arbitrary_bytes_only_ever_raise_a_format_error(data: bytes) -> None:
    refusal(data)
    refusal(MAGIC + data)


@given(st.lists(st.integers(0, 2**16) | st.integers(0, 2**64 - 1), min_size=19, max_size=19), digests)
def test_arbitrary_fields_under_right_checksums_are_refused_or_read_exactly(
    values: list[int], digest: bytes
) -> None:
    names = [row.name for row in ROWS if 136 <= row.offset < 176]
    fields: dict[str, int | bytes] = {
        name: value % (1 << 8 * (SPAN[name].stop - SPAN[name].start))
        for name, value in zip(names, values, strict=False)
    }
    block = sealed(with_fields(BLOCK, prefix_hash=digest, **fields))
    try:
        info = verify_block(block)
    except (InvalidHeader, LengthMismatch):
        return
    assert {name: getattr(info, name) for name in fields} == fields
    assert pack_block(info, payload_of(block)) == block


def test_a_buffer_of_wider_items_counts_as_its_bytes() -> None:
    payload = bytes(INFO.payload_bytes)
    block = pack_block(INFO, payload)
    assert pack_block(INFO, memoryview(payload).cast("I")) == block
    assert verify_block(memoryview(block).cast("Q")) == INFO
    assert payload_of(memoryview(block).cast("Q")) == payload


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_key_of_another_length_is_the_callers_mistake(length: int) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        verify_block(b"whatever", BlockKey(bytes(length)))


def test_a_wrong_namespace_shows_in_the_message() -> None:
    block = pack_block(INFO, bytes(INFO.payload_bytes))
    other = BlockKey(bytes(32) + INFO.prefix_hash)
    with pytest.raises(IdentityMismatch, match=f"{INFO.namespace.hex()[:16]}.*{'0' * 16}"):
        verify_block(block, other)
