"""Fuzz target over the reader of coded blocks."""

import functools
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from tq_store.coded import CODED_HEADER_BYTES, CODED_LAYOUT, pack_coded, unpack_coded
from tq_store.errors import BlockFormatError

GOLDEN = Path(__file__).parent.parent / "golden" / "coded_v1.bin"


def sealed(data: bytes) -> bytes:
    """With a header checksum that agrees, so that a change gets past it; as it is if too short."""
    if len(data) < CODED_HEADER_BYTES:
        return data
    return data[:48] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:48])) + data[CODED_HEADER_BYTES:]


def outcome(data: bytes) -> str:
    """Name of what the reader says; an exception that it may not raise passes through."""
    try:
        block = unpack_coded(data)
    except BlockFormatError as error:
        return type(error).__name__
    assert xxhash.xxh3_128_digest(block) == data[32:48], "gave bytes that nobody coded"
    assert unpack_coded(pack_coded(block)) == block, "gave a block that cannot be coded again"
    return "sound"


def outcomes(data: bytes) -> tuple[str, str]:
    """What the reader says of bytes as they are, and with their header's checksum repaired."""
    return outcome(data), outcome(sealed(data))


def generate(rng: random.Random) -> bytes:
    """The golden file after up to three mutations, at times sealed."""
    data = bytearray(_golden())
    for _ in range(rng.randint(0, 3)):
        kind = rng.choice(["bit", "field", "cut", "more", "run"])
        if kind == "bit" and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "field" and len(data) >= CODED_HEADER_BYTES:
            offset, code = rng.choice(list(CODED_LAYOUT.values()))
            size = struct.calcsize("<" + code)
            old = int.from_bytes(data[offset : offset + size], "little")
            value = rng.choice([0, 1, old + 1, old - 1, old << 8, rng.getrandbits(8 * size)])
            data[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif kind == "cut":
            del data[rng.randint(0, len(data)) :]
        elif kind == "more":
            data += rng.randbytes(rng.choice([1, 7, 100]))
        elif kind == "run":
            start = rng.randint(0, len(data))
            data[start : start + rng.randint(1, 32)] = rng.randbytes(rng.randint(1, 32))
    if rng.random() < 0.3 and len(data) >= CODED_HEADER_BYTES:
        struct.pack_into("<Q", data, 24, len(data) - CODED_HEADER_BYTES)
    return sealed(bytes(data)) if rng.random() < 0.7 else bytes(data)


@contextmanager
def opened() -> Iterator[Callable[[bytes], tuple[str, str]]]:
    """Nothing to prepare."""
    yield outcomes


@functools.cache
def _golden() -> bytes:
    return GOLDEN.read_bytes()
