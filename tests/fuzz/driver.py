"""What all fuzz targets share: mutations of bytes and text, the loop, and what a finding looks like.

A target is a module with `generate`, which makes an input from a random generator, and `opened`, a context in
which inputs may be fed to a parser; what it gives returns names of what was seen, and raises for a finding.
Inputs are bytes, so drivers that are guided by coverage can make them as well. With atheris, from the folder
`tests`; new inputs go to the first directory given::

    python -c "
    import atheris, sys
    from fuzz import fuzz_frames
    atheris.instrument_all()
    with fuzz_frames.opened() as feed:
        atheris.Setup(sys.argv, lambda data: [*feed(data)] and None)
        atheris.Fuzz()" /tmp/corpus
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Feed = Callable[[bytes], Iterable[str]]


class Target(Protocol):
    """What a module of this folder offers."""

    def generate(self, rng: random.Random) -> bytes:
        """An input, mostly one that comes close to being valid."""

    def opened(self) -> AbstractContextManager[Feed]:
        """What to feed inputs to."""


def fuzz(target: Target, *, seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Feed inputs for as long as `keep_going(runs so far)` holds.

    Returns:
        How often each outcome was seen.

    Raises:
        AssertionError: An exception got out, or a lie was told; the message holds the input.
    """
    rng, seen, runs = random.Random(seed), Counter[str](), 0
    with target.opened() as feed:
        while keep_going(runs):
            data = target.generate(rng)
            try:
                seen.update(feed(data))
            except Exception as error:
                raise AssertionError(f"{error!r} on run {runs} of seed {seed}, input {data.hex()}") from error
            runs += 1
    return seen


def mutated(rng: random.Random, data: bytes, pieces: Sequence[bytes] = ()) -> bytes:
    """Up to four changes: bits, bytes, runs left out, put twice or put elsewhere, and pieces put in."""
    result = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        place = rng.randint(0, len(result))
        size = rng.choice([1, 1, 2, 3, 8, 40])
        kind = rng.randrange(7)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(result):
            result[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            del result[place : place + size]
        elif kind == 3:
            result[place:place] = result[place : place + size]
        elif kind == 4:
            run = result[place : place + size]
            del result[place : place + size]
            other = rng.randint(0, len(result))
            result[other:other] = run
        elif kind == 5:
            result[place:place] = rng.choice(pieces) if pieces else rng.randbytes(size)
        else:
            del result[place:]
    return bytes(result)


def packed_list(items: Iterable[bytes]) -> bytes:
    """Several inputs in one."""
    return b"".join(len(item).to_bytes(2, "little") + item for item in items)


def unpacked_list(data: bytes) -> list[bytes]:
    """Several inputs from one; any bytes give some."""
    items, start = [], 0
    while start + 2 <= len(data):
        end = start + 2 + int.from_bytes(data[start : start + 2], "little")
        items.append(data[start + 2 : end])
        start = end
    return items
