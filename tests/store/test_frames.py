import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.rpc import frames
from tq_store.rpc.frames import Assembler, Frame, cut_block, pack_frame, parse_frame
from tq_store.rpc.limits import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES
from tq_store.rpc.v1 import block_store_pb2 as pb

KEY = bytes(range(64))
FIELDS = st.fixed_dictionaries(
    {
        "index": st.integers(0, 2**32 - 1),
        "offset": st.integers(0, 2**64 - 1),
        "block_bytes": st.integers(0, 2**64 - 1),
        "key": st.binary(max_size=200),
        "data": st.binary(max_size=300),
    }
)


def frame(**fields: object) -> Frame:
    return Frame(**{"index": 0} | fields | {"data": memoryview(fields.get("data", b""))})


def assemble(*parts: Frame, num_blocks: int = 4, keyed: bool = True) -> list[tuple[int, bytes, bytes | None]]:
    assembler = Assembler(num_blocks=num_blocks, keyed=keyed)
    blocks = [assembler.add(part) for part in parts]
    return [(block.index, block.key, block.data) for block in blocks if block]


def test_field_numbers_are_those_of_the_proto() -> None:
    numbers = {field.name: field.number for field in pb.BlockFrame.DESCRIPTOR.fields}
    assert numbers == {
        "index": frames.INDEX_FIELD,
        "offset": frames.OFFSET_FIELD,
        "block_bytes": frames.BLOCK_BYTES_FIELD,
        "key": frames.KEY_FIELD,
        "data": frames.DATA_FIELD,
    }


@given(FIELDS)
def test_packing_gives_what_protobuf_gives(fields: dict[str, object]) -> None:
    assert pack_frame(frame(**fields)) == pb.BlockFrame(**fields).SerializeToString(deterministic=True)


@given(FIELDS)
def test_parsing_reads_what_protobuf_writes(fields: dict[str, object]) -> None:
    assert parse_frame(pb.BlockFrame(**fields).SerializeToString()) == frame(**fields)


def test_parsing_passes_over_fields_of_the_future() -> None:
    # numbers 16 to 19: a varint, 8 bytes, 4 bytes, a string
    unknown = b"\x80\x01\x05\x89\x01" + bytes(8) + b"\x95\x01" + bytes(4) + b"\x9a\x01\x02hi"
    raw = pb.BlockFrame(index=3, data=b"abc").SerializeToString()
    assert parse_frame(unknown + raw + unknown) == frame(index=3, data=b"abc")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x08",  # a number is missing
        b"\x08" + b"\xff" * 11,  # a number without end
        b"\x7a\x05abc",  # fewer bytes than announced
        b"\x78\x05",  # data as a number
        b"\x0a\x01x",  # index as a string
        b"\x7d" + bytes(4),  # data as fixed32
        b"\x0b",  # a group
        b"\x89\x01" + bytes(7),  # fixed64 cut short
    ],
)
def test_parsing_rejects_what_is_no_frame(raw: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        parse_frame(raw)


@given(st.binary(max_size=64))
def test_parsing_garbage_gives_a_frame_or_a_value_error(raw: bytes) -> None:
    try:
        parse_frame(raw)
    except ValueError:
        return


@pytest.mark.parametrize(
    "num_bytes", [1, MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1, 3 * MAX_FRAME_BYTES]
)
def test_a_block_that_was_cut_is_put_together_again(num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    packed = [pack_frame(part) for part in cut_block(0, data, key=KEY)]
    assert len(packed) == -(-num_bytes // MAX_FRAME_BYTES)
    assert max(map(len, packed)) < MAX_MESSAGE_BYTES
    assert assemble(*map(parse_frame, packed)) == [(0, KEY, data)]


def test_a_missing_block_is_one_frame() -> None:
    (only,) = cut_block(2, b"")
    assert only == frame(index=2)
    assert assemble(frame(), frame(index=1), keyed=False) == [(0, b"", None), (1, b"", None)]


def test_assembler_knows_when_it_is_inside_a_block() -> None:
    assembler = Assembler(num_blocks=1, keyed=True)
    assert not assembler.is_inside_block
    assembler.add(frame(block_bytes=2, key=KEY, data=b"a"))
    assert assembler.is_inside_block
    assembler.add(frame(offset=1, data=b"b"))
    assert not assembler.is_inside_block


FIRST = frame(block_bytes=4, key=KEY, data=b"ab")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([frame(index=1, block_bytes=1, key=KEY, data=b"a")], "block 1 came where block 0"),
        ([FIRST, frame(index=1, block_bytes=1, key=KEY, data=b"a")], "block 1 came where block 0"),
        ([FIRST, frame(offset=3, data=b"c")], "starts at byte 3, due was 2"),
        ([FIRST, FIRST], "starts at byte 0, due was 2"),
        ([FIRST, frame(offset=2, block_bytes=4, data=b"cd")], "declared twice"),
        ([FIRST, frame(offset=2, key=KEY, data=b"cd")], "declared twice"),
        ([FIRST, frame(offset=2, data=b"cde")], "longer than the 4 bytes"),
        ([FIRST, frame(offset=2)], "carries 0 bytes"),
        ([frame(block_bytes=4, key=KEY)], "carries 0 bytes"),
        ([frame(key=KEY)], "carries 0 bytes"),
        ([frame(key=KEY, data=b"a")], "longer than the 0 bytes"),
        ([frame(block_bytes=1, key=KEY[:-1], data=b"a")], "key of 63 bytes"),
        ([frame(block_bytes=1, data=b"a")], "key of 0 bytes"),
        ([frame(block_bytes=MAX_BLOCK_BYTES + 1, key=KEY, data=b"a")], "over 268435712"),
        (
            [frame(block_bytes=MAX_BLOCK_BYTES, key=KEY, data=bytes(MAX_FRAME_BYTES + 1))],
            f"carries {MAX_FRAME_BYTES + 1} bytes",
        ),
        ([frame(index=i, block_bytes=1, key=KEY, data=b"a") for i in range(5)], "block 4 is one too many"),
    ],
)
def test_assembler_stops_at_the_first_frame_that_breaks_a_rule(parts: list[Frame], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        assemble(*parts)


def test_assembler_of_a_get_takes_no_keys() -> None:
    with pytest.raises(ValueError, match="key of 64 bytes"):
        assemble(frame(block_bytes=1, key=KEY, data=b"a"), keyed=False)
