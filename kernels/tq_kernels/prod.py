"""TurboQuant_prod, the paper's unbiased inner-product quantizer: a reference op that no preset uses.

Of a vector x = |x| u, the rotated direction y = R u is written with bits - 1 bits a channel by the exact
Lloyd-Max codebook, which gives m. Of the residual r = y - m remain its length g and, one bit a channel,
sign(S r), where S is a d x d matrix of independent N(0, 1). Then
x ~ |x| R^T (m + sqrt(pi / 2) / d * g * S^T sign(S r)).
arXiv 2504.19874, Algorithm 2. `kernels/README.md` says why all bits are better spent on m.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from tq_kernels.codebook import lloyd_max, midpoints
from tq_kernels.rotation import rotation_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class ProdVectors:
    """Quantized vectors.

    Args:
        indices: ``[..., head_dim]`` int32 of bits - 1 bits, a magnitude with the sign above it.
        signs: ``[..., head_dim]`` float32, signs of the sketched residual, +1 or -1.
        norms: ``[...]`` float32, lengths of the vectors.
        residual_norms: ``[...]`` float32, lengths of the residuals of unit vectors.
        bits: Bits a channel, indices and signs together, at least 1.
        seed: Of the rotation and of the sketch.
    """

    indices: torch.Tensor
    signs: torch.Tensor
    norms: torch.Tensor
    residual_norms: torch.Tensor
    bits: int
    seed: int


def quantize_prod(vectors: torch.Tensor, *, bits: int, seed: int) -> ProdVectors:
    """Quantize the last axis.

    Args:
        vectors: ``[..., head_dim]``, floating point; head_dim as `rotation_matrix` takes it.
        bits: Bits a channel, at least 1.
        seed: Of the rotation and of the sketch.

    Raises:
        ValueError: `bits` below 1.
    """
    if bits < 1:
        raise ValueError(f"bits must be at least 1, of which one is the sketch's, not {bits}")
    vectors = vectors.float()
    head_dim = vectors.shape[-1]
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = vectors / norms.clamp_min(torch.finfo(torch.float32).tiny)
    rotated = unit @ rotation_matrix(head_dim, seed).T
    centroids = _centroids(bits - 1, head_dim)
    boundaries = torch.tensor(midpoints(centroids[: (len(centroids) + 1) // 2].tolist()))
    magnitude = torch.bucketize(rotated.abs(), boundaries, right=True, out_int32=True)
    indices = magnitude + torch.signbit(rotated).to(torch.int32) * (len(centroids) // 2)
    residual = rotated - centroids[indices]
    sketched = residual @ sketch_matrix(head_dim, seed).T
    return ProdVectors(
        indices=indices,
        signs=1.0 - 2.0 * torch.signbit(sketched).float(),
        norms=norms.squeeze(-1),
        residual_norms=torch.linalg.vector_norm(residual, dim=-1),
        bits=bits,
        seed=seed,
    )


def dequantize_prod(quantized: ProdVectors) -> torch.Tensor:
    """Vectors ``[..., head_dim]`` float32 whose inner product with any vector is unbiased over the sketch."""
    head_dim = quantized.indices.shape[-1]
    sketched = quantized.signs @ sketch_matrix(head_dim, quantized.seed)
    residual = _sketch_factor(head_dim) * quantized.residual_norms[..., None] * sketched
    return _rotate_back(_rotated_mse(quantized) + residual, quantized)


def dequantize_mse(quantized: ProdVectors) -> torch.Tensor:
    """Vectors of the first stage alone: the paper's TurboQuant_mse with bits - 1 bits."""
    return _rotate_back(_rotated_mse(quantized), quantized)


def estimate_inner_products(queries: torch.Tensor, quantized: ProdVectors) -> torch.Tensor:
    """Inner products ``[...]`` of queries ``[..., head_dim]`` with their vectors, in the rotated domain."""
    head_dim = queries.shape[-1]
    rotated = queries.float() @ rotation_matrix(head_dim, quantized.seed).T
    direct = (rotated * _rotated_mse(quantized)).sum(-1)
    sketched = (rotated @ sketch_matrix(head_dim, quantized.seed).T * quantized.signs).sum(-1)
    return quantized.norms * (direct + _sketch_factor(head_dim) * quantized.residual_norms * sketched)


@lru_cache(maxsize=32)
def sketch_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """The Gaussian matrix S: ``[head_dim, head_dim]`` float32 on the CPU."""
    return torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=32)
def _centroids(bits: int, head_dim: int) -> torch.Tensor:
    """Value of every index for a coordinate of a unit vector; without bits, zero."""
    if bits == 0:
        return torch.zeros(1)
    positive = torch.tensor(lloyd_max(bits)) / math.sqrt(head_dim)
    return torch.cat((positive, -positive))


def _sketch_factor(head_dim: int) -> float:
    # E[sign(<s, r>) s] = sqrt(2 / pi) r / |r| for each of the head_dim rows s
    return math.sqrt(math.pi / 2) / head_dim


def _rotated_mse(quantized: ProdVectors) -> torch.Tensor:
    return _centroids(quantized.bits - 1, quantized.indices.shape[-1])[quantized.indices]


def _rotate_back(rotated: torch.Tensor, quantized: ProdVectors) -> torch.Tensor:
    return quantized.norms[..., None] * (rotated @ rotation_matrix(rotated.shape[-1], quantized.seed))
