"""What a way of keeping keys and values is to the harness."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

Sides = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each ``[num_tokens, num_kv_heads, head_dim]`` float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Shape of a model's KV cache.

    Args:
        num_layers: Attention layers.
        num_kv_heads: KV heads of each.
        head_dim: Channels of a key and of a value.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of a token in bf16, all layers."""
        return 4 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where keys and values belong.

    Args:
        layer: Which layer.
        num_layers: Of how many.
        num_sinks: First tokens that attention sees raw, whatever a method makes of them.
    """

    layer: int
    num_layers: int
    num_sinks: int


class Method(Protocol):
    """A way of keeping keys and values.

    The harness gives `read` a sequence from its first token on and lets attention see what comes back, except
    that the first tokens (sinks) stay raw. What comes back of a token must not depend on tokens beyond the
    group of `group_tokens` that it belongs to, counted from the first token.
    """

    @property
    def name(self) -> str:
        """What rows and users call it."""
        ...

    @property
    def group_tokens(self) -> int:
        """Tokens that share statistics; 1 where each token stands alone."""
        ...

    def total_bytes(self, geometry: Geometry, num_tokens: int, num_sinks: int) -> float:
        """Bytes that really hold so many tokens: codes, scales, centres, padding, headers, raw sinks."""
        ...

    def estimate(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """State of one layer, from some first tokens with the sinks left out; None without any.

        Args:
            queries: ``[num_tokens, num_heads, head_dim]`` float32, after RoPE.
            keys: ``[num_tokens, num_kv_heads, head_dim]`` float32, after RoPE.
            values: The shape of the keys.
        """
        ...

    def read(self, keys: torch.Tensor, values: torch.Tensor, state: Any, place: Place) -> Sides:
        """What attention sees of the keys and values of one layer, in place of them.

        Args:
            keys: ``[num_tokens, num_kv_heads, head_dim]`` float32, after RoPE, sinks included.
            values: The same shape.
            state: What `estimate` gave for this layer.
            place: Which layer, and how many tokens are sinks.
        """
        ...
