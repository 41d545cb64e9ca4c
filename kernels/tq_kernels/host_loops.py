"""The loops of `host` over one vector after the other, compiled by Numba where they run.

A vector stays in the processor's first cache from its steps, as `cells` has them, to its bits in words. Sums
of levels are of whole numbers that float32 holds exactly, so their order is free. Lengths are another
kind of sum: processors may differ in its last bit, and so in a step, of which few are at a boundary.

All arrays are contiguous. Vectors are ``[n, dim]`` float32, by section and token. A page is handed over as
flat int32 for its words and as flat int16 for its signs, with `tokens` of a section and `places`, in items of
the two: words of a section, where its words begin, signs of a section, where its signs begin.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from tq_kernels import cells
from tq_kernels.codebook import LEVELS
from tq_kernels.layout import WORD_FORMATS
from tq_kernels.reference import FP16_MAX, SMALLEST_NORM, value_gain
from tq_kernels.spec import Code

_ANY_ORDER = {"reassoc", "contract"}
"""What exact sums allow a compiler to do."""
_UNIT, _TWO = np.float32(1), np.float32(2)
_LAST_STEP = np.float64(cells.NUM_STEPS - 1)
_SIGN_BIT = np.int32(31)
_ONE = np.int32(1)
_HALF_WORD = np.int64(32)


@njit(fastmath=_ANY_ORDER)
def length_of(vector: Any) -> Any:
    """The norm of a vector, float32."""
    squares = np.float32(0)
    for j in range(vector.shape[0]):
        squares += vector[j] * vector[j]
    return np.float32(np.sqrt(np.float64(squares)))


@lru_cache(maxsize=16)
def index_writer(code: Code, *, is_value: bool) -> Callable[..., bool]:
    """The loop that writes indices into pages of zeros, at the best cell size for each vector.

    Its arguments: vectors; centres ``[sections, dim]`` float32, which are taken out; scales ``[n]`` float32,
    overwritten, as `reference.nearest_indices` has them; what brings the range of sizes of a vector of length
    one to one; the likeness from which on a value has no gain; and the page's. It returns whether all norms
    were finite. Squared levels must have sums that are exact in float32.
    """
    form, (edges, differences), levels = WORD_FORMATS[code], _cells(code), _floats(LEVELS[code])
    num_edges = edges.shape[1]
    groups, lanes, sign_plane = form.groups, form.lanes, form.sign_plane
    magnitude_shifts, sign_shifts = _shifts(form.magnitude_shifts), _shifts(form.sign_shifts)
    gain, shortest, largest_scale = (
        np.float32(value_gain(code)),
        np.float32(SMALLEST_NORM),
        np.float32(FP16_MAX),
    )
    has_gain = is_value and gain != 1

    @njit(fastmath=_ANY_ORDER)
    def squares_of(steps: Any, boundaries: Any, magnitudes: Any) -> Any:
        squares = np.float32(0)
        for j in range(steps.shape[0]):
            magnitude, level = np.int32(0), levels[0]
            for k in range(num_edges):
                is_larger = steps[j] >= boundaries[k]
                magnitude = np.int32(k + 1) if is_larger else magnitude
                level = levels[k + 1] if is_larger else level
            magnitudes[j] = magnitude
            squares += level * level
        return squares

    @njit(fastmath=_ANY_ORDER)
    def product_of(steps: Any, magnitudes: Any) -> Any:
        product = np.float32(0)
        for j in range(steps.shape[0]):
            level = levels[0]
            for k in range(num_edges):
                level = levels[k + 1] if magnitudes[j] > k else level
            product += level * (np.float32(steps[j]) * _TWO + _UNIT)
        return product

    @njit(nogil=True)
    def write(
        vectors: Any,
        centers: Any,
        scales: Any,
        to_range: float,
        gain_limit: float,
        words: Any,
        signs: Any,
        tokens: int,
        places: tuple[int, ...],
    ) -> bool:
        dim, wanted, limit = vectors.shape[1], np.float32(to_range), np.float32(gain_limit)
        rest, steps = np.empty(dim, np.float32), np.empty(dim, np.int32)
        magnitudes, negative = np.empty(dim, np.int32), np.empty(dim, np.int32)
        bits, place_of = rest.view(np.int32), steps.view(np.uint32)
        for row in range(vectors.shape[0]):
            section, token = row // tokens, row % tokens
            vector, center = vectors[row], centers[section]
            for j in range(dim):
                rest[j] = vector[j] - center[j]
            norm = length_of(rest)
            if not np.isfinite(norm):
                return False
            factor = _UNIT / max(norm, shortest) * wanted  # in the reference's order
            for j in range(dim):
                negative[j] = (bits[j] >> _SIGN_BIT) & _ONE
                # a product in float32 could be rounded up to the next step
                steps[j] = np.int32(np.float64(min(abs(rest[j]) * factor, _UNIT)) * _LAST_STEP)
            both = np.int64(0)
            for j in range(dim):
                both += differences[place_of[j]]
            near = np.int64(np.int32(both))
            far = (both - near) >> _HALF_WORD
            size = 2 if far < near and far < 0 else 1 if near < 0 else 0
            squares = squares_of(steps, edges[size], magnitudes)
            # float32 sqrt is off by a unit now and then, where PyTorch's norm is not
            scale = norm / np.float32(np.sqrt(np.float64(squares)))
            if has_gain:
                product = product_of(steps, magnitudes)
                scale = scale * gain if product * product / squares < limit else scale
            scales[row] = min(scale, largest_scale)
            word_at, sign_at = section * places[0] + places[1], section * places[2] + places[3]
            if is_value:
                run = tokens // groups
                group, place = token // run, token % run
                at, lane = dim * (place // lanes), place % lanes
                word, sign = (
                    words[word_at + at : word_at + at + dim],
                    signs[sign_at + at : sign_at + at + dim],
                )
                shift, sign_shift = magnitude_shifts[group, lane], sign_shifts[group, lane]
                for j in range(dim):
                    if sign_plane:
                        word[j] |= magnitudes[j] << shift
                        sign[j] |= np.int16(negative[j] << sign_shift)
                    else:
                        word[j] |= magnitudes[j] << shift | negative[j] << sign_shift
            else:
                count = dim // (groups * lanes)
                word = words[word_at + token * count : word_at + (token + 1) * count]
                sign = signs[sign_at + token * count : sign_at + (token + 1) * count]
                for w in range(count):
                    here, flags = np.int32(0), np.int32(0)
                    for group in range(groups):
                        for lane in range(lanes):
                            j = (group * count + w) * lanes + lane
                            here |= magnitudes[j] << magnitude_shifts[group, lane]
                            flags |= negative[j] << sign_shifts[group, lane]
                    if sign_plane:
                        word[w], sign[w] = here, np.int16(flags)
                    else:
                        word[w] = here | flags
        return True

    return write


@lru_cache(maxsize=16)
def index_reader(code: Code, *, is_value: bool) -> Callable[..., None]:
    """The loop that reads levels out of pages, each times the scale of its vector.

    Its arguments: vectors, overwritten; scales ``[n]`` float32; centres, which are added; and the page's.
    """
    form, levels = WORD_FORMATS[code], _floats(LEVELS[code])
    groups, lanes = form.groups, form.lanes
    magnitude_shifts, sign_shifts = _shifts(form.magnitude_shifts), _shifts(form.sign_shifts)
    num_levels, mask, sign_plane = len(levels), np.int32(len(levels) - 1), form.sign_plane

    @njit
    def level_of(magnitude: Any) -> Any:
        level = levels[0]
        for k in range(1, num_levels):
            level = levels[k] if magnitude >= k else level
        return level

    @njit(nogil=True)
    def read(
        vectors: Any, scales: Any, centers: Any, words: Any, signs: Any, tokens: int, places: tuple[int, ...]
    ) -> None:
        dim = vectors.shape[1]
        indices, negative = np.empty(dim, np.int32), np.empty(dim, np.int32)
        for row in range(vectors.shape[0]):
            section, token = row // tokens, row % tokens
            word_at, sign_at = section * places[0] + places[1], section * places[2] + places[3]
            if is_value:
                run = tokens // groups
                group, place = token // run, token % run
                at, lane = dim * (place // lanes), place % lanes
                word, sign = (
                    words[word_at + at : word_at + at + dim],
                    signs[sign_at + at : sign_at + at + dim],
                )
                shift, sign_shift = magnitude_shifts[group, lane], sign_shifts[group, lane]
                for j in range(dim):
                    indices[j] = (word[j] >> shift) & mask
                    negative[j] = ((np.int32(sign[j]) if sign_plane else word[j]) >> sign_shift) & _ONE
            else:
                count = dim // (groups * lanes)
                word = words[word_at + token * count : word_at + (token + 1) * count]
                sign = signs[sign_at + token * count : sign_at + (token + 1) * count]
                for w in range(count):
                    here = word[w]
                    flags = np.int32(sign[w]) if sign_plane else here
                    for group in range(groups):
                        for lane in range(lanes):
                            j = (group * count + w) * lanes + lane
                            indices[j] = (here >> magnitude_shifts[group, lane]) & mask
                            negative[j] = (flags >> sign_shifts[group, lane]) & _ONE
            vector, center, scale = vectors[row], centers[section], scales[row]
            for j in range(dim):
                size = level_of(indices[j]) * scale
                vector[j] = (-size if negative[j] else size) + center[j]

    return read


def _cells(code: Code) -> tuple[Any, Any]:
    """First steps of all magnitudes but the smallest, by size, and differences of squared errors, by step.

    Those are, int64, the first plus 2^32 times the second.
    """
    edges = [[each.index(i) for i in range(1, len(LEVELS[code]))] for each in cells.magnitudes(code)]
    near, far = np.array(cells.differences(code), dtype=np.int64)
    return np.array(edges, dtype=np.int32), near + (far << _HALF_WORD)


def _floats(numbers: Any) -> Any:
    return np.array(numbers, dtype=np.float32)


def _shifts(shifts: Any) -> Any:
    return np.array(shifts, dtype=np.int32)
