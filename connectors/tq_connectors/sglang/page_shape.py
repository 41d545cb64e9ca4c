"""PageShape: keys and values of a page as one process of the engine has them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """A page of keys and values as the engine has it, in a pool of one process.

    Args:
        num_layers: Layers in the pool.
        num_kv_heads: KV heads in it.
        head_dim: Elements of a key and of a value.
        page_tokens: Tokens of a page.
        dtype: Of the elements; uint8 for pages that are packed already.
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
    def is_packed(self) -> bool:
        """Whether pages are packed already: those of `--kv-cache-dtype tq4` and its like."""
        return self.dtype is torch.uint8

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, as in `Namespace.kv_dtype`."""
        return str(self.dtype).removeprefix("torch.")
