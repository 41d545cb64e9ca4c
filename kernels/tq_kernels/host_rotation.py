"""The rotation of `rotation` on a CPU, by butterflies that Numba compiles: a third of a product's time.

R = H D2 H D1 / d with Sylvester's H needs no multiplication but by signs. A step adds and subtracts pairs; on
the way in pairs are neighbours and results halves apart, on the way out the other way round. So every step is
one loop over consecutive numbers of all vectors of a run, whatever the number of channels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from tq_kernels.rotation import rotation_signs

VECTORS_AT_ONCE = 16


def has_butterflies(head_dim: int) -> bool:
    """Whether H is Sylvester's."""
    return head_dim & (head_dim - 1) == 0


@lru_cache(maxsize=32)
def rotator(head_dim: int, seed: int, *, inverse: bool) -> Callable[[Any], None]:
    """The loop that rotates vectors in place, or rotates them back.

    Its argument: contiguous float32 vectors one after the other, ``[n * head_dim]``, n a multiple of
    `VECTORS_AT_ONCE`. `head_dim` must be a power of two.
    """
    run = VECTORS_AT_ONCE * head_dim
    half, steps = run // 2, head_dim.bit_length() - 1
    signs = np.array(rotation_signs(head_dim, seed), dtype=np.float32).reshape(2, head_dim)
    before, after = np.tile(signs[0], VECTORS_AT_ONCE), np.full(run, 1 / head_dim, dtype=np.float32)
    if inverse:
        before, after = after, before
    # in the middle the channels are the slow axis
    between = np.repeat(signs[1], VECTORS_AT_ONCE)

    @njit
    def step_in(source: Any, target: Any) -> None:
        for j in range(half):
            first, second = source[2 * j], source[2 * j + 1]
            target[j] = first + second
            target[half + j] = first - second

    @njit
    def step_out(source: Any, target: Any) -> None:
        for j in range(half):
            first, second = source[j], source[half + j]
            target[2 * j] = first + second
            target[2 * j + 1] = first - second

    @njit(nogil=True)
    def rotate(vectors: Any) -> None:
        here, there = np.empty(run, np.float32), np.empty(run, np.float32)
        for start in range(0, vectors.size, run):
            those = vectors[start : start + run]
            for j in range(run):
                here[j] = those[j] * before[j]
            for _ in range(steps):
                step_in(here, there)
                here, there = there, here
            for j in range(run):
                here[j] *= between[j]
            for _ in range(steps):
                step_out(here, there)
                here, there = there, here
            for j in range(run):
                those[j] = here[j] * after[j]

    return rotate
