"""The document, the code and the golden files say the same about block format v1."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash
from store.block_document import DOCUMENT, ROWS, SPAN

from tq_store.block import (
    HEADER_BYTES,
    HEADER_LAYOUT,
    MAGIC,
    MAX_BLOCK_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockInfo,
    pack_block,
    parse_header,
    verify_block,
)
from tq_store.keys import BlockKey

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_FIELDS = json.loads((GOLDEN / "block_v1.json").read_text())
GOLDEN_SHA256 = {
    "block_v1_typical.bin": "177f35b69fa8aedff4b13ccb202db545c01d0911af240267c4f311d54c179295",
    "block_v1_smallest.bin": "d8766bef112a188e0a594e6150b50b0c90fc4600a76f2babe0bcbc69488e28bb",
    "block_v1_extreme.bin": "f10b0a9098f85ca71f90a83ac8951a72b9f5ca070533c7efd85838193637f70d",
}


def test_the_documented_table_is_the_layout() -> None:
    documented = {row.name: (row.offset, row.size) for row in ROWS}
    real = {name: (offset, struct.calcsize("<" + code)) for name, (offset, code) in HEADER_LAYOUT.items()}

    assert documented == real
    assert list(documented) == list(real)
    assert len(documented) == len(ROWS)


def test_the_documented_fields_fill_the_header_aligned() -> None:
    assert [row.offset for row in ROWS] == [0, *(row.span.stop for row in ROWS[:-1])]
    assert ROWS[-1].span.stop == HEADER_BYTES == 256
    assert all(row.offset % row.size == 0 for row in ROWS if row.size <= 8)


def test_documented_limits_are_the_limits() -> None:
    assert f"{MAX_PAYLOAD_BYTES:,} (256 MiB), so a block is at most {MAX_BLOCK_BYTES:,} bytes" in DOCUMENT
    assert f"`{MAGIC.hex(' ').upper()}`" in DOCUMENT


@pytest.mark.parametrize("name", GOLDEN_SHA256)
def test_golden_bytes_are_those_that_were_released(name: str) -> None:
    assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == GOLDEN_SHA256[name]
    assert set(GOLDEN_FIELDS) == set(GOLDEN_SHA256) == {path.name for path in GOLDEN.glob("block_v1*.bin")}


@pytest.mark.parametrize("name", GOLDEN_SHA256)
def test_golden_block_reads_and_writes_exactly(name: str) -> None:
    block, recorded = (GOLDEN / name).read_bytes(), GOLDEN_FIELDS[name]
    fields = {field.name: recorded[field.name] for field in dataclasses.fields(BlockInfo)}
    fields |= {n: bytes.fromhex(value) for n, value in fields.items() if isinstance(value, str)}

    assert verify_block(block, BlockKey(fields["namespace"] + fields["prefix_hash"])) == BlockInfo(**fields)
    assert parse_header(block[:HEADER_BYTES]) == BlockInfo(**fields)
    assert pack_block(BlockInfo(**fields), block[256:]) == block


@pytest.mark.parametrize("name", GOLDEN_SHA256)
def test_a_reader_built_from_the_document_alone_reads_golden_blocks(name: str) -> None:
    block, recorded = (GOLDEN / name).read_bytes(), dict(GOLDEN_FIELDS[name])
    recorded |= {"magic": "895451420d0a1a0a", "reserved": "00" * 72}
    recorded |= {"format_version": 1, "header_bytes": 256, "flags": 0}
    read: dict[str, Any] = {
        field: block[span].hex()
        if isinstance(recorded[field], str)
        else int.from_bytes(block[span], "little")
        for field, span in SPAN.items()
    }

    assert read == recorded
    assert read["header_checksum"] == xxhash.xxh3_64_intdigest(block[:248], seed=0)
    assert int(read["payload_checksum"], 16) == xxhash.xxh3_128_intdigest(block[256:], seed=0)
    assert read["payload_bytes"] == len(block) - 256
    assert read["payload_bytes"] == (
        read["num_layers"] * (read["num_tokens"] // read["page_tokens"]) * read["page_bytes"]
    )
