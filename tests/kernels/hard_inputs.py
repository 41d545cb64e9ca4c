"""Vectors that a rotation must work hardest for."""

import math

import torch

HARD_INPUTS = ["one_sparse", "four_outliers", "constant", "constant_sign", "fixed_channel"]


def hard_input(kind: str, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors ``[n, head_dim]``; where channels are special, every channel is so equally often."""
    if kind == "one_sparse":
        return torch.cat((torch.eye(head_dim), -torch.eye(head_dim)))
    if kind == "four_outliers":
        vectors = torch.zeros(4 * head_dim, head_dim)
        order = torch.rand(4, head_dim, head_dim, generator=generator).argsort(-1)[..., :4].flatten(0, 1)
        signs = torch.randint(0, 2, order.shape, generator=generator) * 2.0 - 1
        return vectors.scatter_(1, order, signs)
    if kind == "constant":
        return torch.ones(1, head_dim) * torch.randn(64, 1, generator=generator)
    if kind == "constant_sign":
        return torch.randn(256, head_dim, generator=generator).abs()
    rest = torch.randn(4 * head_dim, head_dim, generator=generator)
    channel = torch.arange(4 * head_dim)[:, None] % head_dim
    rest = rest.scatter(1, channel, 0.0)
    rest *= math.sqrt(0.03) / torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    return rest.scatter(1, channel, math.sqrt(0.97))
