"""Every tolerance of the kernel tests, each with where it comes from. Loosening one is a change by itself."""

import torch

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding to nearest."""

DISTORTION = 0.01
"""Measured against predicted distortion, relative: what the project promises for every preset."""

SIGMAS = 4.0
"""Standard errors that a statistical test's tolerance must be worth; 1 in 16,000 by chance."""

HARD_INPUT = 1.5
"""Distortion on inputs far from Gaussian over that on Gaussian ones: what the project promises."""

ORTHOGONALITY = 1e-6
"""Entries of R R^T - 1, with R rounded to float32: at most 2 |R| 2^-24 plus second order, so 1.2e-7; 1e-6
leaves room for the float32 sums of kernels that rotate in steps."""

LENGTH = 2 * UNIT_ROUNDOFF[torch.float16]
"""Relative error of a reconstruction's length: half an fp16 ulp from the scale, the rest for float32 sums."""

FP16_SUBNORMAL = 2.0**-25
"""Absolute error of rounding a number below 2^-14 to fp16: half the spacing of subnormals."""


def rotation_error(head_dim: int) -> float:
    """Of a float32 product with the rotation, relative to the vector's length.

    Each coordinate sums d products: its error is at most d u sum |R_ij| |x_j| <= d u |x|, as rows have length
    one. Twice that, for the rounding of R itself.
    """
    return 2 * head_dim * UNIT_ROUNDOFF[torch.float32]


def half_product_error(dtype: torch.dtype | None) -> float:
    """Of a rotated vector that was rounded to float16 before it is rotated back, relative to its length.

    Each coordinate errs by at most u sum |R_ij| |x_j| <= u |x|. Vectors for caches in half precision are so
    rounded, those for float32 are not.
    """
    return UNIT_ROUNDOFF[torch.float16] if dtype in (torch.float16, torch.bfloat16) else 0.0


def attention_error(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> tuple[float, float]:
    """Largest float32 error to be expected of attention outputs and of log-sum-exps.

    A sum of d products errs by at most 4 sqrt(d) u times the lengths of its vectors, except in 1 sum of 1,500
    even if every rounding were as bad as it can be (Higham and Mary, 2019); real ones are far better. A score
    has three such steps, the rotations of q and k and their product, hence an error
    e = 12 sqrt(d) u |q| |k| softmax_scale. It moves probabilities by a factor within exp(+-2 e), so an output
    by 2 e max |v_j|; the sum over n tokens and the rotation back of values and of outputs add
    4 (sqrt(n) + 2 sqrt(d)) u |v|. A log-sum-exp moves by e, and 4 u times its own size for its sum.
    """
    if not len(keys):
        return 0.0, 0.0
    head_dim, num_tokens = query.shape[-1], keys.shape[0]
    u = UNIT_ROUNDOFF[torch.float32]
    q, k, v = (_longest(tensor) for tensor in (query, keys, values))
    score = 12 * head_dim**0.5 * u * q * k * softmax_scale
    out = 2 * score * float(values.abs().max()) + 4 * (num_tokens**0.5 + 2 * head_dim**0.5) * u * v
    return out, score + 4 * u * (q * k * softmax_scale + 10)


def half_score_error(query: torch.Tensor, keys: torch.Tensor, softmax_scale: float) -> float:
    """Error to be expected of a score whose query was rounded to float16.

    A vector's rounding errors are independent and at most u of each number, so at random angles to a key
    their product has a standard deviation of at most u |q| |k| / sqrt(3 d). A query rounded once errs alike
    for all keys that have something in common, which moves a log-sum-exp and no probability.
    """
    u, head_dim = UNIT_ROUNDOFF[torch.float16], query.shape[-1]
    return SIGMAS * u * _longest(query) * _longest(keys) * softmax_scale / (3 * head_dim) ** 0.5


def _longest(vectors: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(vectors.double(), dim=-1).max())


FLASH_RULE = 2.0
"""Error of an attention kernel over that of a plain half-precision one: FlashAttention's own rule."""

QUANTIZE_FLIPS = 1e-3
"""Share of indices that two writers with other orders of sums may choose differently. Those of PyTorch on a
CPU and on a GPU differed in 7e-5 of all bytes (`benchmarks/NOTES.md`)."""

SCALE_ULPS = 1
"""Units in the last place by which an fp16 scale may differ: float32 sums fall on either side of a tie."""


def boundary_distance(head_dim: int, target: float, stretch: float) -> float:
    """How far from a boundary an index may go either way, in units of levels.

    A rotated coordinate errs by `rotation_error` times |x|, and is multiplied by target sqrt(d) / |z|.
    The stretch is the largest |x| / |z|: a key less its centre can be much shorter. Twice that, for the error
    of |z|.
    """
    return 2 * target * head_dim**0.5 * rotation_error(head_dim) * stretch


COLD_DISTORTION = {2: 0.074, 3: 0.0185, 4: 0.0047}
"""Of cold pages on Gaussian vectors, by bits of an index: what the project promises. Shannon's bound is
4^-bits, Lloyd-Max has 0.117, 0.0345 and 0.0095."""

COLD_DRIFT = 1.01
"""Squared error of keys after five cold generations through bfloat16, over that after one. bfloat16 rounds
keys five deviations from zero by up to 2^-8 of that, and their mean over a page by far less."""
SEARCH = 5e-3
"""Relative, between the distortion of a choice by tables of whole numbers and of a search by exact angles.
The size of least error is not quite that of the smallest angle, and errors are rounded to quanta, which picks
the second best of two near equals at times."""
SEARCH_GAIN = {2: {64: 0.015, 128: 0.007}, 3: {64: 0.07, 128: 0.038}, 4: {64: 0.148, 128: 0.102}}
"""Share of the distortion that `cells.SIZES` takes off a Gaussian vector, by bits and channels; computed
from 8,192 vectors each in float32 by a script that knows nothing of this package."""
