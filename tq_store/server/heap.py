"""The C allocator of a server process, set so that its memory stays near what it holds."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # from glibc's malloc.h
_SETTINGS = (
    # blocks get a mapping of their own, which goes back to the kernel whole; frames are reused
    (_MMAP_THRESHOLD, 2 << 20),
    # at the heap's end so much stays: giving it back, and faulting it in again, costs more than any copy
    (_TOP_PAD, 12 << 20),
    (_TRIM_THRESHOLD, 16 << 20),
    # several arenas would each keep freed frames of their own
    (_ARENA_MAX, 1),
)


def settle_heap() -> None:
    """Set the allocator of this process, before it has threads. Does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _SETTINGS:
            mallopt(parameter, value)
