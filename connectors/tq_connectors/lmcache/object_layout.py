"""The layout of an object of LMCache's as text, so that a reader can allocate it before it has the bytes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_BYTES = "bytes"
_MAX_GROUPS = 64
_GROUP = re.compile(r"(?P<dtype>[a-z0-9_.]{1,32})\[(?P<shape>\d{1,12}(, \d{1,12}){0,7})\]")


@dataclass(frozen=True, slots=True)
class ObjectLayout:
    """Format, shapes and dtypes of an object; a dtype of None is bytes, as many as its first size."""

    format: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the object."""
        return sum(
            shape[0] if dtype is None else math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )

    def text(self) -> str:
        """In words that only equal layouts share."""
        return " ".join((self.format, describe(self.shapes, self.dtypes)))


def describe(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype | None]) -> str:
    """Shapes and dtypes in words that only equal ones share."""
    return " ".join(
        f"{_BYTES if dtype is None else dtype}{list(shape)}"
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def parse_layout(text: str) -> ObjectLayout:
    """Undo `ObjectLayout.text`.

    Raises:
        ValueError: Anything else.
    """
    name, _, rest = text.partition(" ")
    groups = re.split(r"(?<=\]) ", rest)
    matches = [_GROUP.fullmatch(group) for group in groups[: _MAX_GROUPS + 1]]
    if not re.fullmatch(r"[A-Z0-9_]{1,32}", name) or len(groups) > _MAX_GROUPS:
        raise ValueError(f"{text[:80]!r} is no layout")
    shapes, dtypes = [], []
    for match in matches:
        if match is None or match["dtype"] not in (*_DTYPES, _BYTES):
            raise ValueError(f"{text[:80]!r} is no layout")
        shapes.append(tuple(int(size) for size in match["shape"].split(", ")))
        dtypes.append(_DTYPES.get(match["dtype"]))
    return ObjectLayout(name, tuple(shapes), tuple(dtypes))
