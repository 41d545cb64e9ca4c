"""Distortion of a method on made-up vectors whose right answer is known."""

import torch

from benchmarks.quality.cache_view import state_of
from benchmarks.quality.methods.base import Geometry, Method, Place
from benchmarks.quality.rows import Row

_NUM_TOKENS = 1024
_OUTLIER_ENERGY = 0.97


def inputs(head_dim: int) -> dict[str, torch.Tensor]:
    """Vectors ``[num_tokens, 1, head_dim]`` by kind, the same every time.

    ``gaussian`` is what rotation makes of anything; ``sparse`` has one channel other than zero, another one
    for every token; ``outlier`` has 97 % of its energy in one fixed channel; ``offset`` has 90 % of its
    energy in a mean that all tokens share, as keys have.
    """
    generator = torch.Generator().manual_seed(20_260)
    gaussian = torch.randn(_NUM_TOKENS, 1, head_dim, generator=generator)
    channels = torch.randint(head_dim, (_NUM_TOKENS, 1, 1), generator=generator)
    sparse = torch.zeros_like(gaussian).scatter_(-1, channels, gaussian[..., :1])
    outlier = gaussian.clone()
    outlier[..., head_dim // 3] *= (_OUTLIER_ENERGY / (1 - _OUTLIER_ENERGY) * (head_dim - 1)) ** 0.5
    offset = gaussian + 3 * torch.randn(1, 1, head_dim, generator=generator)
    return {"gaussian": gaussian, "sparse": sparse, "outlier": outlier, "offset": offset}


def measure_codec(method: Method, geometry: Geometry, num_sinks: int) -> Row:
    """Relative squared error of keys and of values, by kind of input; keys of ``offset`` about their mean."""
    place = Place(layer=geometry.num_layers // 2, num_layers=geometry.num_layers, num_sinks=num_sinks)
    row: Row = {}
    made = inputs(geometry.head_dim)
    queries = made["gaussian"]
    for kind, vectors in made.items():
        state = state_of(method, queries, vectors, vectors, num_sinks, _NUM_TOKENS)
        for side, read in zip(("key", "value"), method.read(vectors, vectors, state, place), strict=True):
            error = (read - vectors)[num_sinks:].square().sum()
            mean = vectors.mean(0) if side == "key" and kind == "offset" else 0
            row[f"codec_{side}_{kind}"] = float(error / (vectors - mean)[num_sinks:].square().sum())
    return row
