r"""Fuzz target over the reader of coded blocks, with a mutating driver that needs nothing installed.

::

    python tests/fuzz/fuzz_coded.py --seconds 60

`TestOneInput` is for drivers guided by coverage, as in `fuzz_block.py`.
"""

import argparse
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
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


def TestOneInput(data: bytes) -> None:
    """Silent, or an exception."""
    outcome(data)
    outcome(sealed(data))


def mutated(rng: random.Random, golden: bytes) -> bytes:
    """The golden file after up to three mutations, at times sealed."""
    data = bytearray(golden)
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


def fuzz(seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Feed mutations to the reader for as long as `keep_going(runs so far)` holds.

    Raises:
        AssertionError: An exception got out; the message holds the input.
    """
    rng, seen, runs, golden = random.Random(seed), Counter[str](), 0, GOLDEN.read_bytes()
    while keep_going(runs):
        data = mutated(rng, golden)
        try:
            seen[outcome(data)] += 1
        except Exception as error:
            raise AssertionError(f"{error!r} on run {runs} of seed {seed}, input {data.hex()}") from error
        runs += 1
    return seen


def main() -> None:
    """Fuzz for a time and print what was seen; a finding ends it with a traceback and status 1."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of coded blocks.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    deadline = time.monotonic() + args.seconds
    seen = fuzz(seed, lambda _: time.monotonic() < deadline)
    print(f"seed {seed}, {seen.total()} inputs:", *(f"{n} {name}" for name, n in seen.most_common()))


if __name__ == "__main__":
    main()
