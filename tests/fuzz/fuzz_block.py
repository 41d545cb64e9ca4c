r"""Fuzz target over the block parser, with a mutating driver that needs nothing installed.

::

    python tests/fuzz/fuzz_block.py --seconds 60

`TestOneInput` is for drivers guided by coverage. With atheris, from this folder; new inputs go to the first
directory given, which must not be the golden one::

    mkdir -p /tmp/corpus
    python -c "import atheris, sys, fuzz_block as f; atheris.instrument_all(); \
        atheris.Setup(sys.argv, f.TestOneInput); atheris.Fuzz()" /tmp/corpus ../golden
"""

import argparse
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
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
        return type(error).__name__
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


def TestOneInput(data: bytes) -> None:
    """The same in the form that libFuzzer drivers call: silent, or an exception."""
    outcomes(data)


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


def mutated(rng: random.Random, corpus: list[bytes]) -> bytes:
    """A member of the corpus after up to four mutations, at times with its checksums repaired."""
    block = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(0, 4)):
        rng.choice(_MUTATIONS)(rng, block)
    return sealed(bytes(block)) if rng.random() < 0.5 else bytes(block)


def fuzz(seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Feed mutations of the golden files to the parser for as long as `keep_going(runs so far)` holds.

    Returns:
        How often each outcome was seen, two for each run.

    Raises:
        AssertionError: An exception got out; the message holds the input.
    """
    rng, seen, runs = random.Random(seed), Counter[str](), 0
    corpus = [path.read_bytes() for path in sorted(CORPUS.glob("block_*.bin"))]
    while keep_going(runs):
        data = mutated(rng, corpus)
        try:
            seen.update(outcomes(data))
        except Exception as error:
            raise AssertionError(f"{error!r} on run {runs} of seed {seed}, input {data.hex()}") from error
        runs += 1
    return seen


def main() -> None:
    """Fuzz for a time and print what was seen; a finding ends it with a traceback and status 1."""
    parser = argparse.ArgumentParser(description="Fuzz the block parser.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("inputs", nargs="*", type=Path, help="run these files once instead")
    args = parser.parse_args()
    if args.inputs:
        for path in args.inputs:
            print(path, *outcomes(path.read_bytes()))
        return
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    deadline = time.monotonic() + args.seconds
    seen = fuzz(seed, lambda _: time.monotonic() < deadline)
    print(f"seed {seed}, {seen.total() // 2} inputs:", *(f"{n} {name}" for name, n in seen.most_common()))


if __name__ == "__main__":
    main()
