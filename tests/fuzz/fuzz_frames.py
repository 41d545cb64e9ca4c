"""Fuzz target over frames and what puts them together, compared with what protobuf reads."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fuzz.driver import mutated, packed_list, unpacked_list
from google.protobuf.message import DecodeError

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.keys import BLOCK_KEY_BYTES
from tq_store.rpc.frames import Assembler, Frame, cut_block, pack_frame, parse_frame
from tq_store.rpc.limits import MAX_FRAME_BYTES
from tq_store.rpc.v1 import block_store_pb2 as pb

_NUM_BLOCKS = 3
_KEY = bytes(range(BLOCK_KEY_BYTES))
_VARINTS = [
    b"\x00",
    b"\xff" * 9 + b"\x01",
    b"\xff" * 10,
    b"\x80" * 12,
    b"\xff\xff\xff\xff\x0f",
    b"\x80\x80\x40",
]
_TAGS = [bytes([number << 3 | kind]) for number in (0, 1, 2, 3, 4, 15) for kind in range(8)]


def generate(rng: random.Random) -> bytes:
    """The frames of one call, with some of them changed, left out, doubled or in another order."""
    is_keyed = rng.random() < 0.5
    frames: list[bytes] = []
    for index in range(rng.randint(1, _NUM_BLOCKS)):
        block = rng.randbytes(rng.choice([0, 1, 10, 300]))
        frames += [pack_frame(frame) for frame in _cut(rng, index, block, _KEY if is_keyed else b"")]
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(frames))
        kind = rng.randrange(5)
        if kind == 0:
            frames.insert(place, frames[place])
        elif kind == 1 and len(frames) > 1:
            del frames[place]
        elif kind == 2:
            frames.insert(rng.randrange(len(frames)), frames.pop(place))
        else:
            frames[place] = mutated(rng, frames[place], _VARINTS + _TAGS)
    return bytes([is_keyed]) + packed_list(frames)


def _cut(rng: random.Random, index: int, block: bytes, key: bytes) -> Iterator[Frame]:
    """As `cut_block` does it, or in smaller frames, or with a length that is not the block's."""
    if rng.random() < 0.3 or not block:
        yield from cut_block(index, block, key=key)
        return
    step = rng.choice([1, 7, 100]) if len(block) < 100 else 100
    declared = (
        len(block) if rng.random() < 0.8 else rng.choice([len(block) + 1, 2**64 - 1, MAX_BLOCK_BYTES + 1])
    )
    for offset in range(0, len(block), step):
        data = memoryview(block)[offset : offset + step]
        if offset:
            yield Frame(index=index, offset=offset, data=data)
        else:
            yield Frame(index=index, block_bytes=declared, key=key, data=data)


def outcomes(data: bytes) -> Iterator[str]:
    """Parse each frame and put those before the first bad one together."""
    is_keyed, raws = bool(data[:1] > b"\0"), unpacked_list(data[1:])
    assembler = Assembler(num_blocks=_NUM_BLOCKS, keyed=is_keyed)
    is_readable, received, blocks = True, 0, 0
    for raw in raws:
        try:
            frame = parse_frame(raw)
        except ValueError:
            yield "refused frame"
            is_readable = False
            continue
        _compare(frame, raw)
        yield "frame"
        if not is_readable:
            continue
        received += len(frame.data)
        try:
            whole = assembler.add(frame)
        except ValueError:
            yield "broken order"
            is_readable = False
            continue
        if whole is None:
            continue
        assert whole.index == blocks < _NUM_BLOCKS, "blocks out of order"
        assert len(whole.key) == (BLOCK_KEY_BYTES if is_keyed else 0), "a block with a key of another length"
        assert len(whole.data or b"") <= min(received, MAX_BLOCK_BYTES), "more bytes than were received"
        assert whole.data != b"", "a block without bytes"
        blocks += 1
        yield "block" if whole.data else "missing"


def _compare(frame: Frame, raw: bytes) -> None:
    """Where protobuf reads the bytes as well, it must read the same."""
    assert len(frame.data) <= max(len(raw), MAX_FRAME_BYTES)
    try:
        other = pb.BlockFrame.FromString(raw)
    except DecodeError:
        return
    ours = (
        frame.index % 2**32,
        frame.offset % 2**64,
        frame.block_bytes % 2**64,
        frame.key,
        bytes(frame.data),
    )
    assert ours == (other.index, other.offset, other.block_bytes, other.key, other.data), (
        "not what protobuf reads"
    )


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """Nothing to prepare."""
    yield outcomes
