"""How LMCache lays a chunk of keys and values out, and views of it as tokens, heads and channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tq_connectors.lmcache.object_layout import describe

KV_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class UnsupportedLayout(ValueError):
    """LMCache registered a cache that the serde cannot quantize; the message says what it found."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A chunk of keys and values.

    Args:
        num_layers: Layers in the chunk, over all groups.
        num_tokens: Tokens in the chunk.
        dtype: Of every group.
        groups: Of each of LMCache's groups of layers, how many layers, and whether a head's key and value
            lie side by side (vLLM since 0.26) and not in two planes.
    """

    num_layers: int
    num_tokens: int
    dtype: torch.dtype
    groups: tuple[tuple[int, bool], ...]


def read_layout(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], num_kv_heads: int, head_dim: int
) -> KVLayout:
    """The layout that LMCache describes by shapes.

    Known are ``[2, layers, tokens, heads * dim]``, and with keys and values side by side
    ``[1, layers, tokens, heads * 2 * dim]`` and ``[layers, tokens, heads * 2 * dim]``.

    Raises:
        UnsupportedLayout: Anything else, among it MLA, which has no values, and caches in bytes.
    """
    told = f"the serde was told {num_kv_heads} KV heads of {head_dim} channels"
    expected = f"{told}, LMCache registered {describe(shapes, dtypes)}"
    if not shapes or len(set(dtypes)) != 1 or dtypes[0] not in KV_DTYPES:
        raise UnsupportedLayout(f"{expected}: not of one floating-point dtype")
    width = num_kv_heads * head_dim
    groups, tokens = [], set()
    for shape in shapes:
        planes, layers, num_tokens, channels = (1, *shape) if len(shape) == 3 else (*shape, 0, 0, 0, 0)[:4]
        if len(shape) not in (3, 4) or (planes, channels) not in ((2, width), (1, 2 * width)):
            raise UnsupportedLayout(
                f"{expected}: neither two planes of {width} nor one of {2 * width} channels"
            )
        groups.append((layers, planes == 1))
        tokens.add(num_tokens)
    if len(tokens) != 1:
        raise UnsupportedLayout(f"{expected}: groups of different numbers of tokens")
    return KVLayout(sum(layers for layers, _ in groups), tokens.pop(), dtypes[0], tuple(groups))


def sides(tensor: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one group, layer after layer: views ``[layers * tokens, heads, dim]``.

    Args:
        tensor: A contiguous tensor of one of the shapes that `read_layout` knows.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
    """
    if tensor.dim() == 4 and tensor.shape[0] == 2:
        keys, values = tensor.view(2, -1, num_kv_heads, head_dim).unbind(0)
    else:
        keys, values = tensor.view(-1, num_kv_heads, 2, head_dim).unbind(2)
    return keys, values


def num_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """Bytes of a chunk in memory."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
