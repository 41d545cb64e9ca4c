"""The seeded orthogonal rotation: two rounds of random signs and a Hadamard matrix.

R = H D2 H D1 / d, where D1 and D2 are diagonal signs and H is a d x d matrix of +-1 with orthogonal rows.
One round leaves sparse inputs on a few points; two make any input look Haar-rotated (measured in the tests).
H exists for d = 2^k, 12 * 2^k and 20 * 2^k: Sylvester's doubling of 1 and of Paley's orders 12 and 20.
"""

from functools import lru_cache

import torch

from tq_kernels.layout import HADAMARD_ROOTS, can_rotate

_MASK64 = (1 << 64) - 1


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def rotation_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """Rotation R: ``[head_dim, head_dim]`` float32 on the CPU; a row vector x is rotated as ``x @ R.T``.

    Raises:
        ValueError: No Hadamard matrix of this size is known here; the message says which are.
    """
    hadamard = hadamard_matrix(head_dim).to(torch.float64)
    signs = torch.tensor(rotation_signs(head_dim, seed), dtype=torch.float64)
    first, second = signs[:head_dim], signs[head_dim:]
    return ((hadamard * second) @ (hadamard * first) / head_dim).to(torch.float32)


def hadamard_matrix(order: int) -> torch.Tensor:
    """Matrix of +-1 with orthogonal rows: ``[order, order]`` int64.

    Raises:
        ValueError: `order` is not 2^k, 12 * 2^k or 20 * 2^k.
    """
    if not can_rotate(order):
        raise ValueError(f"no Hadamard matrix of order {order} is known here; 2^k, 12 * 2^k and 20 * 2^k are")
    root = HADAMARD_ROOTS[order // (order & -order)]
    matrix = torch.ones(1, 1, dtype=torch.int64) if root == 1 else _paley(root - 1)
    while matrix.shape[0] < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley(prime: int) -> torch.Tensor:
    """Paley's first construction for a prime p = 3 mod 4: a Hadamard matrix of order p + 1."""
    squares = {i * i % prime for i in range(1, prime)}
    character = [0, *(1 if i in squares else -1 for i in range(1, prime))]
    matrix = torch.eye(prime + 1, dtype=torch.int64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1
    for i in range(prime):
        for j in range(prime):
            matrix[i + 1, j + 1] += character[(i - j) % prime]
    return matrix


def rotation_signs(head_dim: int, seed: int) -> list[float]:
    """The diagonal of D1, then that of D2."""
    return [float(sign) for sign in _signs(seed, 2 * head_dim)]


def _signs(seed: int, count: int) -> list[int]:
    """Signs from the top bits of SplitMix64, so that any language can reproduce them."""
    signs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        signs.append(-1 if (mixed ^ (mixed >> 31)) >> 63 else 1)
    return signs
