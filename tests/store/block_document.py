"""The header table of `proto/BLOCK_FORMAT.md` as data, and changes to blocks at its offsets."""

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = (Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md").read_text()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One field of the header.

    Args:
        offset: First byte.
        size: Bytes.
        name: As in `HEADER_LAYOUT`.
        flipped: Name of the error for a flipped bit.
        wrong: Name of the error for a wrong value under a right checksum, or ``any``.
    """

    offset: int
    size: int
    name: str
    flipped: str
    wrong: str

    @property
    def span(self) -> slice:
        """Where the field lies in a block."""
        return slice(self.offset, self.offset + self.size)


ROWS = [
    Row(offset=int(offset), size=int(size), name=name, flipped=flipped, wrong=wrong)
    for offset, size, name, flipped, wrong in re.findall(
        r"^\| (\d+) \| (\d+) \| `(\w+)` \|.*\| (\w+) \| (\w+) \|$", DOCUMENT, re.MULTILINE
    )
]
SPAN = {row.name: row.span for row in ROWS}


def with_fields(block: bytes, **values: int | bytes) -> bytes:
    """The block with header fields replaced at their documented offsets; checksums left as they are."""
    changed = bytearray(block)
    for name, value in values.items():
        size = SPAN[name].stop - SPAN[name].start
        changed[SPAN[name]] = value.to_bytes(size, "little") if isinstance(value, int) else value
    assert len(changed) == len(block)
    return bytes(changed)


def with_bit_flipped(data: bytes, bit: int) -> bytes:
    """The same bytes with one bit the other way round; bit 0 is the lowest of the first byte."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
