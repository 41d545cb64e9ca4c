r"""Fuzz target over the reader of cold pages, with a mutating driver that needs nothing installed.

::

    PYTHONPATH=kernels python tests/fuzz/fuzz_cold.py --seconds 60

A page must be refused as damaged or give finite numbers, and stay as it is. `TestOneInput` is for drivers
guided by coverage, as in `fuzz_block.py`.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable

import torch

from tq_kernels.cold_layout import HEADER_FIELDS, ColdLayout, section_bytes_for
from tq_kernels.cold_page import dequantize, quantize

LAYOUT = ColdLayout(head_dim=16, num_kv_heads=1, page_tokens=16, section_bytes=section_bytes_for(2, 16, 16))
_SIZES = {"B": 1, "H": 2, "h": 2}


def corpus() -> list[bytes]:
    """Sound pages of several kinds of vectors."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randn(16, 1, 16, generator=generator) * size for size in (0.0, 1e-20, 1.0, 1e4)]
    return [quantize(keys, values, LAYOUT).numpy().tobytes() for keys in kinds for values in kinds]


def mutated(rng: random.Random, pages: list[bytes]) -> bytes:
    """A page after up to three mutations, of the same length."""
    data = bytearray(rng.choice(pages))
    for _ in range(rng.randint(0, 3)):
        kind = rng.choice(["bit", "field", "state", "run", "zeros"])
        start = rng.randrange(len(data))
        if kind == "bit":
            data[start] ^= 1 << rng.randrange(8)
        elif kind == "field":
            offset, code = rng.choice(list(HEADER_FIELDS.values()))
            data[offset : offset + _SIZES[code]] = rng.randbytes(_SIZES[code])
        elif kind == "state":
            start = LAYOUT.states_offset + 4 * rng.randrange(8)
            data[start : start + 4] = rng.randbytes(4)
        elif kind == "run":
            length = min(rng.randint(1, 32), len(data) - start)
            data[start : start + length] = rng.randbytes(length)
        else:
            data[start:] = bytes(len(data) - start)
    return bytes(data)


def outcome(data: bytes) -> str:
    """What the reader says of one page; an exception that it may not raise passes through."""
    page = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
    try:
        sides = dequantize(page, LAYOUT)
    except ValueError as error:
        if "damaged" not in str(error):
            raise
        return "refused"
    assert all(bool(side.isfinite().all()) for side in sides), "gave numbers that are none"
    assert page.numpy().tobytes() == data, "changed its input"
    return "read"


def TestOneInput(data: bytes) -> None:
    """Silent, or an exception; bytes are cut and filled up to a page."""
    outcome(data[: LAYOUT.page_bytes].ljust(LAYOUT.page_bytes, b"\0"))


def fuzz(seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Feed mutations to the reader for as long as `keep_going(runs so far)` holds.

    Raises:
        AssertionError: An exception got out; the message holds the input.
    """
    rng, seen, runs, pages = random.Random(seed), Counter[str](), 0, corpus()
    while keep_going(runs):
        data = mutated(rng, pages)
        try:
            seen[outcome(data)] += 1
        except Exception as error:
            raise AssertionError(f"{error!r} on run {runs} of seed {seed}, input {data.hex()}") from error
        runs += 1
    return seen


def main() -> None:
    """Fuzz for a time and print what was seen; a finding ends it with a traceback and status 1."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of cold pages.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    deadline = time.monotonic() + args.seconds
    seen = fuzz(seed, lambda _: time.monotonic() < deadline)
    print(f"seed {seed}, {seen.total()} inputs:", *(f"{n} {name}" for name, n in seen.most_common()))


if __name__ == "__main__":
    main()
