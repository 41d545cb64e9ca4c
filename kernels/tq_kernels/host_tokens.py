"""An engine's tokens to vectors and back on a CPU, by loops that Numba compiles; and the centres of keys.

PyTorch would do each of these in one operation, and wake a thread on every core for it: on a machine that has
other work, that costs many times what is to be done.

Tokens are ``[num_tokens, num_kv_heads, head_dim]`` with any strides, as numpy sees them: float32, or the bits
of bfloat16 as uint16. Vectors are contiguous float32 by page, head and token.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit

_HALF_WORD, _ONE = np.uint32(16), np.uint32(1)
_ROUND, _EXPONENT, _SIZE = np.uint32(0x7FFF), np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
_QUIET = np.uint32(0x400000)


def as_array(tokens: torch.Tensor) -> Any:
    """Tokens as numpy sees them; those that are neither float32 nor bfloat16 come as a copy in float32."""
    tokens = tokens.detach()
    if tokens.dtype is torch.bfloat16:
        return tokens.view(torch.uint16).numpy()
    return tokens.float().numpy()


@lru_cache(maxsize=2)
def loader(*, is_bits: bool) -> Callable[[Any, int, Any], None]:
    """The loop that fills vectors; its arguments: tokens, tokens of a page, vectors ``[n, head_dim]``."""

    @njit(nogil=True)
    def load(tokens: Any, page_tokens: int, vectors: Any) -> None:
        heads, dim = tokens.shape[1], tokens.shape[2]
        bits = vectors.view(np.uint32)
        for t in range(tokens.shape[0]):
            for head in range(heads):
                row = ((t // page_tokens) * heads + head) * page_tokens + t % page_tokens
                source, vector, vector_bits = tokens[t, head], vectors[row], bits[row]
                for j in range(dim):
                    if is_bits:
                        vector_bits[j] = np.uint32(source[j]) << _HALF_WORD
                    else:
                        vector[j] = source[j]

    return load


@lru_cache(maxsize=2)
def storer(*, is_bits: bool) -> Callable[[Any, int, Any], None]:
    """The loop that fills tokens from vectors, rounded to nearest; arguments as those of `loader`'s."""

    @njit(nogil=True)
    def store(tokens: Any, page_tokens: int, vectors: Any) -> None:
        heads, dim = tokens.shape[1], tokens.shape[2]
        bits = vectors.view(np.uint32)
        for t in range(tokens.shape[0]):
            for head in range(heads):
                row = ((t // page_tokens) * heads + head) * page_tokens + t % page_tokens
                target, vector, vector_bits = tokens[t, head], vectors[row], bits[row]
                for j in range(dim):
                    if is_bits:
                        wide = vector_bits[j]
                        rounded = wide + _ROUND + ((wide >> _HALF_WORD) & _ONE)
                        is_number = (wide & _SIZE) <= _EXPONENT  # what is none stays so
                        target[j] = np.uint16((rounded if is_number else wide | _QUIET) >> _HALF_WORD)
                    else:
                        target[j] = vector[j]

    return store


@njit(nogil=True)
def mean_of_sections(vectors: Any, page_tokens: int, means: Any) -> None:
    """Write the means ``[n / page_tokens, head_dim]`` float32 of the vectors of each page and head."""
    dim = vectors.shape[1]
    for section in range(means.shape[0]):
        mean = means[section]
        for j in range(dim):
            mean[j] = 0
        for t in range(page_tokens):
            vector = vectors[section * page_tokens + t]
            for j in range(dim):
                mean[j] += vector[j]
        for j in range(dim):
            mean[j] /= np.float32(page_tokens)
