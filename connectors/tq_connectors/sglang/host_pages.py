"""SGLang's pages in host memory, seen in one order whatever layout its host pool has."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from tq_connectors.sglang.page_shape import PageShape
from tq_store.errors import ConfigError


class HostPool(Protocol):
    """What is needed of SGLang's host pools; `HostKVCache` has it."""

    layout: str
    page_size: int
    dtype: torch.dtype

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """The page whose first token lies at `index`; a view of the pool where `flat` is false."""

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """A page of zeros in the pool's layout, flat."""


_ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_first": lambda page: page,
    "page_first": lambda page: page.transpose(1, 2),
    "page_first_direct": lambda page: page.squeeze(1),
    "page_head": lambda page: page.squeeze(1).permute(0, 3, 2, 1, 4),
}
"""From what `get_data_page` gives to ``[2, layers, tokens, heads, channels]``, without a copy."""


class HostPages:
    """Pages of one host pool with keys and values of the same heads and channels.

    Args:
        pool: SGLang's host pool.
        shape: Of its pages.
    """

    def __init__(self, pool: HostPool, shape: PageShape) -> None:
        self.pool = pool
        self.shape = shape
        first, second = (pool.get_data_page(index, flat=False) for index in (0, pool.page_size))
        self._first = _ORDERS[pool.layout](first).view(shape.dtype)
        self._strides = self._first.stride()
        self._between = second.storage_offset() - first.storage_offset()

    def page(self, index: int) -> torch.Tensor:
        """The page whose first token lies at `index`: a view ``[2, layers, tokens, heads, channels]``.

        Pages lie at equal distances, so it is found in one step; asking the pool takes several.
        """
        offset = self._first.storage_offset() + index // self.shape.page_tokens * self._between
        return self._first.as_strided(self._first.shape, self._strides, offset)

    def empty_flat(self) -> torch.Tensor:
        """A flat page in the pool's layout, to be filled through `view_flat`."""
        return self.pool.get_dummy_flat_data_page()

    def view_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat page in the pool's layout, seen like `page`."""
        shape = self.pool.get_data_page(0, flat=False).shape
        return _ORDERS[self.pool.layout](flat.view(shape)).view(self.shape.dtype)


def read_host_pool(pool: Any, float8: torch.dtype | None = None) -> HostPages:
    """The pages of SGLang's host pool.

    Args:
        pool: SGLang's host pool.
        float8: The dtype of an fp8 cache, whose pools hold bytes for SGLang; None for another cache.

    Raises:
        ConfigError: A pool whose pages cannot be seen as keys and values of heads; the message says why.
    """
    if pool.layout not in _ORDERS:
        raise ConfigError(
            f"the store does not know the host layout {pool.layout!r}; "
            f"start SGLang with --hicache-mem-layout {' or '.join(_ORDERS)}"
        )
    try:
        page = _ORDERS[pool.layout](pool.get_data_page(0, flat=False))
        sides, num_layers, page_tokens, num_kv_heads, head_dim = page.shape
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
        raise ConfigError(f"{type(pool).__name__} does not hold keys and values of heads: {error}") from error
    bytes_differ = float8 is not None and page.dtype.itemsize != 1
    if sides != 2 or page_tokens != pool.page_size or page.dtype != pool.dtype or bytes_differ:
        raise ConfigError(
            f"{type(pool).__name__} does not hold keys and values of heads: a page is {list(page.shape)}"
        )
    shape = PageShape(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        dtype=float8 or page.dtype,
    )
    return HostPages(pool, shape)
