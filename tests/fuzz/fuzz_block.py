"""Fuzz target over the parser of blocks: header, checksums, identity, and what `inspect` says of them."""

import functools
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from tq_store.block import (
    HEADER_BYTES,
    HEADER_LAYOUT,
    MAX_PAYLOAD_BYTES,
    pack_block,
    parse_header,
    verify_block,
)
from tq_store.describe import describe_block
from tq_store.errors import BlockFormatError, IdentityMismatch
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey

CORPUS = Path(__file__).parent.parent / "golden"
_FOREIGN_KEY = BlockKey(b"\xa5" * BLOCK_KEY_BYTES)


def sealed(block: bytes) -> bytes:
    """The same block with checksums that agree, so that a change gets past them; as it is if too short."""
    if len(block) < HEADER_BYTES:
        return block
    payload = block[HEADER_BYTES:]
    head = block[:24] + xxhash.xxh3_128_digest(payload) + block[40:248]
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + payload


def _outcome(data: bytes) -> str:
    """Name of what the parser says; an exception that it may not raise, or a lie of its, passes through."""
    try:
        info = verify_block(data)
    except BlockFormatError as error:
        is_sound, _ = describe_block(data)
        assert not is_sound, "a block that does not verify is described as a sound one"
        return type(error).__name__
    assert describe_block(data)[0], "a sound block is described as another"
    assert info.payload_bytes == len(data) - HEADER_BYTES <= MAX_PAYLOAD_BYTES, "accepted a wrong length"
    assert parse_header(data) == info, "the header alone reads differently"
    assert pack_block(info, data[HEADER_BYTES:]) == data, "accepted bytes that no writer produces"
    assert verify_block(memoryview(data), info.key) == info, "the block does not match its own key"
    if info.key != _FOREIGN_KEY:
        try:
            verify_block(data, _FOREIGN_KEY)
        except IdentityMismatch:
            return "sound"
        raise AssertionError("the block was accepted under another key")
    return "sound"


def outcomes(data: bytes) -> tuple[str, str]:
    """Feed bytes to the parser, as they are and with their checksums repaired.

    Returns:
        Both outcomes: the name of the error, or ``"sound"``.

    Raises:
        Exception: The parser raised something other than a BlockFormatError, or accepted what it must not.
    """
    return _outcome(data), _outcome(sealed(data))


def _flip_bit(rng: random.Random, block: bytearray) -> None:
    if block:
        block[rng.randrange(len(block))] ^= 1 << rng.randrange(8)


def _set_field(rng: random.Random, block: bytearray) -> None:
    if len(block) < HEADER_BYTES:
        return
    offset, code = rng.choice(list(HEADER_LAYOUT.values()))
    size = struct.calcsize("<" + code)
    top = (1 << 8 * size) - 1
    old = int.from_bytes(block[offset : offset + size], "little")
    value = rng.choice([0, 1, top, top >> 1, old + 1, old - 1, old * 2, rng.getrandbits(8 * size)])
    block[offset : offset + size] = (value & top).to_bytes(size, "little")


def _fix_payload_length(rng: random.Random, block: bytearray) -> None:
    """Write the product of the geometry where the header repeats it, so that deeper checks are reached."""
    if len(block) < HEADER_BYTES:
        return
    page_bytes, num_tokens, page_tokens, _, _, num_layers = struct.unpack_from("<IIIHHH", block, 152)
    payload_bytes = num_layers * (num_tokens // max(page_tokens, 1)) * page_bytes
    struct.pack_into("<Q", block, 16, payload_bytes & (1 << 64) - 1)
    if payload_bytes < 1 << 16:
        block[HEADER_BYTES:] = rng.randbytes(payload_bytes)


def _truncate(rng: random.Random, block: bytearray) -> None:
    del block[rng.randint(0, len(block)) :]


def _append(rng: random.Random, block: bytearray) -> None:
    block += rng.randbytes(rng.choice([1, 7, HEADER_BYTES, 1000]))


def _overwrite(rng: random.Random, block: bytearray) -> None:
    start, size = rng.randint(0, len(block)), rng.randint(1, 64)
    block[start : start + size] = rng.randbytes(size)


_MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip_bit,
    _set_field,
    _set_field,
    _fix_payload_length,
    _truncate,
    _append,
    _overwrite,
)


def generate(rng: random.Random) -> bytes:
    """A golden file after up to four mutations, at times with its checksums repaired."""
    block = bytearray(rng.choice(_corpus()))
    for _ in range(rng.randint(0, 4)):
        rng.choice(_MUTATIONS)(rng, block)
    return sealed(bytes(block)) if rng.random() < 0.5 else bytes(block)


@contextmanager
def opened() -> Iterator[Callable[[bytes], tuple[str, str]]]:
    """Nothing to prepare."""
    yield outcomes


@functools.cache
def _corpus() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CORPUS.glob("block_*.bin"))]
