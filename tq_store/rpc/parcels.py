"""Blocks on a pipe: each behind a header, which says to which call it belongs and how long it is."""

import os
import struct
from collections.abc import Iterator, Sequence

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.runs import runs_of

_HEADER = struct.Struct("<QII")
PARCEL_HEADER_BYTES = _HEADER.size
MAX_CALL_NUMBER = (1 << 64) - 1
_STEP_BYTES = 1 << 20
_HEADERS_BYTES = 16 << 10
"""What a step may have beyond that, so that the header before a large piece goes with it."""
_MOST_PIECES = os.sysconf("SC_IOV_MAX")


def parse_parcel_header(raw: bytes, *, call: int, index: int) -> int:
    """Bytes of the block that follows, 0 for a missing one.

    Raises:
        ValueError: It is of another call or another block, or too long.
    """
    its_call, its_index, num_bytes = _HEADER.unpack(raw)
    if (its_call, its_index) != (call, index):
        raise ValueError(f"block {its_index} of another call came where block {index} was due")
    if num_bytes > MAX_BLOCK_BYTES:
        raise ValueError(f"block {index} is declared with {num_bytes} bytes, over {MAX_BLOCK_BYTES}")
    return int(num_bytes)


def cut_parcels(call: int, first: int, blocks: Sequence[bytes | None]) -> Iterator[Sequence[memoryview]]:
    """What is to be written for blocks, in steps of about a mebibyte: views, so that nothing is copied.

    Args:
        call: The call's number.
        first: Position of the first block among the keys.
        blocks: None for a missing one.
    """
    pieces: list[memoryview] = []
    for index, block in enumerate(blocks, first):
        view = memoryview(block or b"")
        pieces.append(memoryview(_HEADER.pack(call, index, len(view))))
        pieces += (view[start : start + _STEP_BYTES] for start in range(0, len(view), _STEP_BYTES))
    return runs_of(pieces, len, most_bytes=_STEP_BYTES + _HEADERS_BYTES, most_items=_MOST_PIECES)
