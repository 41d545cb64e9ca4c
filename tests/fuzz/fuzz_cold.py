"""Fuzz target over the reader of cold pages: refused as damaged, or finite numbers, and left as they are."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tq_kernels.cold_layout import HEADER_FIELDS, ColdLayout, section_bytes_for
from tq_kernels.cold_page import dequantize, quantize

LAYOUT = ColdLayout(head_dim=16, num_kv_heads=1, page_tokens=16, section_bytes=section_bytes_for(2, 16, 16))
_SIZES = {"B": 1, "H": 2, "h": 2}


@functools.cache
def corpus() -> list[bytes]:
    """Sound pages of several kinds of vectors."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randn(16, 1, 16, generator=generator) * size for size in (0.0, 1e-20, 1.0, 1e4)]
    return [quantize(keys, values, LAYOUT).numpy().tobytes() for keys in kinds for values in kinds]


def generate(rng: random.Random) -> bytes:
    """A page after up to three mutations, of the same length."""
    data = bytearray(rng.choice(corpus()))
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


def outcomes(data: bytes) -> Iterator[str]:
    """Bytes are cut and filled up to a page."""
    yield outcome(data[: LAYOUT.page_bytes].ljust(LAYOUT.page_bytes, b"\0"))


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """With one thread, as pages are small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield outcomes
    finally:
        torch.set_num_threads(num_threads)
