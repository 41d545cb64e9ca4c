"""Values that were handed out and that nobody holds any more: their memory is written again.

A block is a mapping of its own to the allocator, which goes back to the kernel when it is freed; to fault the
next one in costs as much as to copy it.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Iterator

_LEAST_BYTES = 256 << 10
_MOST_BYTES = 24 << 20
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


def _references(values: deque[bytes]) -> Iterator[int]:
    """How many references there are to each value; no code of Python's holds or borrows one meanwhile."""
    return map(sys.getrefcount, values)


_UNHELD = next(_references(deque([_new_bytes(None, 1)])))
"""References to a value that nobody else holds, as this interpreter counts them."""


class UsedValues:
    """Keeps the last values, 24 MiB of them at most, until they are free or others come."""

    def __init__(self) -> None:
        self._values: deque[bytes] = deque()
        self._num_bytes = 0

    def take(self, num_bytes: int) -> bytes:
        """Bytes of this length to be written before anybody sees them; what is in them means nothing."""
        for position, count in enumerate(_references(self._values)):
            value = self._values[position]
            if count == _UNHELD and len(value) == num_bytes:
                del self._values[position]
                self._num_bytes -= num_bytes
                return value
        made: bytes = _new_bytes(None, num_bytes)  # not zeroed, which would take as long as a copy
        return made

    def add(self, value: bytes) -> None:
        """A value that is handed out now."""
        if not _LEAST_BYTES <= len(value) <= _MOST_BYTES:
            return
        self._values.append(value)
        self._num_bytes += len(value)
        while self._num_bytes > _MOST_BYTES:
            self._num_bytes -= len(self._values.popleft())
