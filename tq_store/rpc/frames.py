"""Frames: a block on the wire is cut into them, and put together again by a receiver that trusts nothing.

`BlockFrame` is encoded here by hand, byte for byte what protobuf makes of it: through message objects each
payload byte would be copied three times on each side, here it is copied once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.keys import BLOCK_KEY_BYTES
from tq_store.rpc.limits import MAX_FRAME_BYTES

INDEX_FIELD, OFFSET_FIELD, BLOCK_BYTES_FIELD, KEY_FIELD, DATA_FIELD = 1, 2, 3, 4, 15
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_NO_DATA = memoryview(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Part of a block; the fields are those of `BlockFrame` in the proto.

    Args:
        data: A view, so that cutting and parsing copy nothing; it keeps the bytes that it shows alive.
    """

    index: int
    offset: int = 0
    block_bytes: int = 0
    key: bytes = b""
    data: memoryview = _NO_DATA


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedBlock:
    """A block put together from its frames; `data` is None where the sender says that it has none."""

    index: int
    key: bytes
    data: bytes | None


def cut_block(index: int, data: bytes, *, key: bytes = b"") -> Iterator[Frame]:
    """The frames of one block, in order; a single one for a block without bytes, which says "missing"."""
    view = memoryview(data)
    yield Frame(index=index, block_bytes=len(data), key=key, data=view[:MAX_FRAME_BYTES])
    for offset in range(MAX_FRAME_BYTES, len(data), MAX_FRAME_BYTES):
        yield Frame(index=index, offset=offset, data=view[offset : offset + MAX_FRAME_BYTES])


def pack_frame(frame: Frame) -> bytes:
    """A frame as a serialized `BlockFrame`; the payload is copied here and nowhere else."""
    head = bytearray()
    for number, value in (
        (INDEX_FIELD, frame.index),
        (OFFSET_FIELD, frame.offset),
        (BLOCK_BYTES_FIELD, frame.block_bytes),
    ):
        if value:
            head.append(number << 3 | _VARINT)
            head += _pack_varint(value)
    if frame.key:
        head.append(KEY_FIELD << 3 | _LENGTH_DELIMITED)
        head += _pack_varint(len(frame.key)) + frame.key
    if frame.data:
        head.append(DATA_FIELD << 3 | _LENGTH_DELIMITED)
        head += _pack_varint(len(frame.data))
    return b"".join((head, frame.data))


def parse_frame(raw: bytes) -> Frame:
    """The frame in a serialized `BlockFrame`, its data a view of `raw`. Unknown fields are passed over.

    Raises:
        ValueError: Not a protobuf message, or a field of the wrong type.
    """
    numbers = {INDEX_FIELD: 0, OFFSET_FIELD: 0, BLOCK_BYTES_FIELD: 0}
    strings = {KEY_FIELD: _NO_DATA, DATA_FIELD: _NO_DATA}
    view, position = memoryview(raw), 0
    while position < len(raw):
        tag, position = _parse_varint(raw, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _parse_varint(raw, position)
            if number in strings:
                raise ValueError(f"field {number} of a frame is a number")
            if number in numbers:
                numbers[number] = value
            continue
        if number in numbers or (number in strings and wire_type != _LENGTH_DELIMITED):
            raise ValueError(f"field {number} of a frame has wire type {wire_type}")
        if wire_type == _LENGTH_DELIMITED:
            length, position = _parse_varint(raw, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"a frame holds wire type {wire_type}, which does not exist")
        if length > len(raw) - position:
            raise ValueError(f"field {number} of a frame says {length} bytes, {len(raw) - position} are left")
        if number in strings:
            strings[number] = view[position : position + length]
        position += length
    return Frame(
        index=numbers[INDEX_FIELD],
        offset=numbers[OFFSET_FIELD],
        block_bytes=numbers[BLOCK_BYTES_FIELD],
        key=bytes(strings[KEY_FIELD]),
        data=strings[DATA_FIELD],
    )


class Assembler:
    """Puts the frames of one call together, block after block.

    Holds at most the declared bytes of one block, and never more than were really received: a declared length
    reserves nothing, and a thousand tiny frames take no more room than one large. Each byte is copied once:
    `BytesIO` hands its buffer out as `bytes` without another copy.

    Args:
        num_blocks: Blocks that this call may carry at most.
        keyed: Whether each block's first frame must name its key, as in a Put, or must not, as in a Get.
    """

    def __init__(self, *, num_blocks: int, keyed: bool) -> None:
        self._num_blocks = num_blocks
        self._keyed = keyed
        self._index = 0
        self._key = b""
        self._block_bytes = 0
        self._received = BytesIO()

    @property
    def is_inside_block(self) -> bool:
        """Whether a block was begun and is not yet whole."""
        return self._received.tell() > 0

    def add(self, frame: Frame) -> ReceivedBlock | None:
        """Take one frame; returns the block that it completes.

        Raises:
            ValueError: The frame is out of order or breaks a bound. The call is not worth reading further.
        """
        if frame.index != self._index:
            raise ValueError(f"a frame of block {frame.index} came where block {self._index} was due")
        if frame.offset != self._received.tell():
            raise ValueError(
                f"a frame of block {frame.index} starts at byte {frame.offset}, "
                f"due was {self._received.tell()}"
            )
        if not self.is_inside_block:
            self._begin(frame)
        elif frame.block_bytes or frame.key:
            raise ValueError(f"block {frame.index} is declared twice")
        if not self._block_bytes and not self._keyed and not frame.data:
            self._index += 1
            return ReceivedBlock(index=frame.index, key=b"", data=None)
        if not 0 < len(frame.data) <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame carries {len(frame.data)} bytes; it may carry 1 to {MAX_FRAME_BYTES}")
        if frame.offset + len(frame.data) > self._block_bytes:
            raise ValueError(f"block {frame.index} is longer than the {self._block_bytes} bytes declared")
        self._received.write(frame.data)
        if self._received.tell() < self._block_bytes:
            return None
        whole = ReceivedBlock(index=self._index, key=self._key, data=self._received.getvalue())
        self._index, self._received = self._index + 1, BytesIO()
        return whole

    def _begin(self, frame: Frame) -> None:
        if frame.index >= self._num_blocks:
            raise ValueError(f"block {frame.index} is one too many; the call may carry {self._num_blocks}")
        if frame.block_bytes > MAX_BLOCK_BYTES:
            raise ValueError(
                f"block {frame.index} is declared with {frame.block_bytes} bytes, over {MAX_BLOCK_BYTES}"
            )
        if len(frame.key) != (BLOCK_KEY_BYTES if self._keyed else 0):
            raise ValueError(f"block {frame.index} comes with a key of {len(frame.key)} bytes")
        self._block_bytes, self._key = frame.block_bytes, frame.key


def _pack_varint(value: int) -> bytes:
    packed = bytearray()
    while value > 0x7F:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def _parse_varint(raw: bytes, position: int) -> tuple[int, int]:
    """Value at a position, and the position after it."""
    value = 0
    for shift, byte in enumerate(raw[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise ValueError("a number in a frame does not end")
