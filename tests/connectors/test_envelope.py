"""Objects become blocks that the store verifies, and come back whole or not at all."""

import struct
from dataclasses import replace

import pytest
from store.sample_blocks import sample_block, sample_key

from tq_connectors.envelope import MAX_LAYOUT_BYTES, OBJECT_CODEC_ID, pack_object, unpack_object
from tq_kernels import cold_layout, spec
from tq_store.block import HEADER_BYTES, pack_block, parse_header, verify_block
from tq_store.errors import IdentityMismatch, InvalidHeader

KEY = sample_key(1)


@pytest.mark.parametrize("layout", ["", "uint8[5]", "x" * 59, "x" * 60, "x" * 61, "ü" * 40])
@pytest.mark.parametrize("size", [0, 1, 64, 1000])
def test_an_object_comes_back_with_its_layout(layout, size):
    data = bytes(number % 251 for number in range(size))
    block = pack_object(KEY, layout, data)
    assert verify_block(block, KEY).codec_id == OBJECT_CODEC_ID
    found = unpack_object(KEY, block)
    assert (found.layout, bytes(found.data)) == (layout, data)


def test_the_number_of_an_object_is_no_other_codecs():
    assert len({OBJECT_CODEC_ID, spec.CODEC_ID, cold_layout.CODEC_ID}) == 3


def test_the_data_of_every_object_is_aligned():
    for size in range(200):
        found = unpack_object(KEY, pack_object(KEY, "x" * size, b"data"))
        assert found.data.nbytes == 4
        assert (len(pack_object(KEY, "x" * size, b"data")) - HEADER_BYTES - 4) % 64 == 0


def test_a_block_of_another_kind_or_key_is_no_object():
    key, block = sample_block(1)
    with pytest.raises(IdentityMismatch):
        unpack_object(key, block)
    with pytest.raises(IdentityMismatch):
        unpack_object(sample_key(2), pack_object(KEY, "uint8[1]", b"x"))


def test_a_layout_that_is_too_long_makes_no_block():
    with pytest.raises(InvalidHeader, match="over 4096"):
        pack_object(KEY, "x" * (MAX_LAYOUT_BYTES + 1), b"")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"abc", "too short"),
        (struct.pack("<I", 5000) + bytes(6000), "does not fit"),
        (struct.pack("<I", 100) + bytes(60), "does not fit"),
        (struct.pack("<I", 2) + b"\xff\xfe" + bytes(58), "not text"),
    ],
)
def test_a_sound_block_with_a_payload_that_is_none_is_refused(payload, message):
    info = replace(parse_header(pack_object(KEY, "", b"")), page_bytes=len(payload))
    with pytest.raises(InvalidHeader, match=message):
        unpack_object(KEY, pack_block(info, payload))
