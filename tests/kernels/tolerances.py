"""Every tolerance of the kernel tests, each with where it comes from. Loosening one is a change of its own."""

import torch

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding to nearest."""

DISTORTION = 0.01
"""Measured against predicted distortion, relative: what the project promises for every preset."""

SIGMAS = 4.0
"""A statistical test must see a deviation of its tolerance as so many standard errors; 1 in 16,000 by chance."""

HARD_INPUT = 1.5
"""Distortion on inputs far from Gaussian over that on Gaussian ones: what the project promises."""

ORTHOGONALITY = 1e-6
"""Entries of R R^T - 1, with R rounded to float32: at most 2 |R| 2^-24 plus second order, so 1.2e-7; 1e-6 leaves
room for the float32 sums of kernels that rotate in steps."""

LENGTH = 2 * UNIT_ROUNDOFF[torch.float16]
"""Relative error of a reconstruction's length: half an fp16 ulp from the scale, the rest for float32 sums."""

FP16_SUBNORMAL = 2.0**-25
"""Absolute error of rounding a number below 2^-14 to fp16: half the spacing of subnormals."""


def rotation_error(head_dim: int) -> float:
    """Of a float32 product with the rotation, relative to the vector's length.

    Each coordinate sums d products; |error| <= d u sum |R_ij| |x_j| <= d u |x|, as rows have length one. Twice
    that, for the rounding of R itself.
    """
    return 2 * head_dim * UNIT_ROUNDOFF[torch.float32]


def attention_error(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> tuple[float, float]:
    """Worst float32 error of attention outputs and of log-sum-exps.

    Score: rotations of q and k and a dot product, each within d u |q| |k| and the rotations twice that, then the
    scale; its absolute error e moves every probability by a factor within exp(2 e). Output: 2 e |v|, plus a sum
    of n products and the rotation of values, (n + 2 d) u |v|. Log-sum-exp: e, plus n u for the sum and
    4 u |score| for adding and multiplying numbers of a score's size.
    """
    head_dim, num_tokens = query.shape[-1], keys.shape[0]
    u = UNIT_ROUNDOFF[torch.float32]
    q, k, v = (_longest(tensor) for tensor in (query, keys, values))
    score = (5 * head_dim + 4) * u * q * k * softmax_scale
    return 2 * score * v + (num_tokens + 2 * head_dim) * u * v, score + num_tokens * u + 1e-6


def _longest(vectors: torch.Tensor) -> float:
    if not vectors.numel():
        return 0.0
    return float(torch.linalg.vector_norm(vectors.double(), dim=-1).max())
