"""What a page of the engine is: its shape, and which part of a page of the whole model it is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """A page of keys and values as the engine has it.

    Args:
        num_layers: Layers that this process holds.
        num_kv_heads: KV heads that it holds.
        head_dim: Channels of a key and of a value.
        page_tokens: Tokens of a page.
        dtype: Of keys and values.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of all layers, keys and values."""
        values = 2 * self.num_layers * self.page_tokens * self.num_kv_heads * self.head_dim
        return values * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, as in `Namespace.kv_dtype`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePart:
    """Which part of a page of the whole model one process holds.

    Args:
        first_layer: Its first attention layer, counted from 0.
        num_layers: Its attention layers.
        first_kv_head: Its first KV head.
        num_kv_heads: Its KV heads.
        total_kv_heads: KV heads of the whole model.
        rank: What else tells it from other processes of its replica; empty for one that has no such thing.
    """

    first_layer: int
    num_layers: int
    first_kv_head: int
    num_kv_heads: int
    total_kv_heads: int
    rank: str = ""

    def __str__(self) -> str:
        layers = f"layers {self.first_layer}+{self.num_layers}"
        return f"{layers} heads {self.first_kv_head}+{self.num_kv_heads} {self.rank}"
