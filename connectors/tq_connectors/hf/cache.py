"""TQCache: a transformers cache of compressed pages, with the newest tokens raw until they fill a page."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tq_kernels.layout import PageLayout
from tq_kernels.reference import quantize
from tq_kernels.reference_attention import extend_attention

_LAYER_ATTRIBUTE = "_tq_layer"
_FIRST_CAPACITY_PAGES = 8

NUM_SINKS = 4
"""Tokens at the start of a sequence whose keys and values stay raw."""

PageListener = Callable[[int, torch.Tensor], None]
"""Called with a page's index and its bytes ``[num_layers, page_bytes]`` once all layers have sealed it."""


def layer_of(key: torch.Tensor) -> "TQLayer | None":
    """The cache layer that returned these keys, or None when another kind of cache did."""
    return getattr(key, _LAYER_ATTRIBUTE, None)


class TQCache(Cache):
    """Working cache of one sequence, for ``attn_implementation="tq"``.

    Pages are made once, when their last token arrives, and never made again from their own reconstruction.
    The first `NUM_SINKS` tokens, on which most attention rests, are read raw even where a page has them too.

    Args:
        layout: Page layout.
        num_layers: Attention layers of the model.
        on_page: Told of every page that this cache made; not of pages it was given.
    """

    def __init__(self, layout: PageLayout, num_layers: int, on_page: PageListener | None = None) -> None:
        self.layout = layout
        self._on_page = on_page
        self._pages = torch.empty(num_layers, 0, layout.page_bytes, dtype=torch.uint8)
        self._num_announced = 0
        self._layers = [TQLayer(self, index) for index in range(num_layers)]
        super().__init__(layers=list(self._layers))

    @property
    def num_pages(self) -> int:
        """Pages that every layer has."""
        return min(layer.num_pages for layer in self._layers)

    def preload(self, pages: Iterable[memoryview]) -> int:
        """Continue with pages from the store in place of the tokens that the cache holds.

        Args:
            pages: For each page its bytes, ``num_layers * page_bytes`` of them, in order of position.

        Returns:
            The number of tokens the cache now holds; unchanged when there was no page.

        Raises:
            ValueError: The cache does not hold just the sinks.
        """
        if self.get_seq_length() != NUM_SINKS:
            raise ValueError(f"pages can be loaded after exactly the first {NUM_SINKS} tokens")
        device = self._layers[0].device
        for index, page in enumerate(pages):
            self.reserve(index + 1, device)
            # bytearray: torch wants writable memory, and the copy is the one on the way into the pool
            self._pages[:, index] = torch.frombuffer(bytearray(page), dtype=torch.uint8).view(
                len(self.layers), -1
            )
            self._num_announced = index + 1
        if self._num_announced:
            for layer in self._layers:
                layer.start_after(self._num_announced)
        return self.get_seq_length()

    def page(self, index: int) -> torch.Tensor:
        """Bytes of one page in all layers: ``[num_layers, page_bytes]``, a copy."""
        return self._pages[:, index].clone()

    def pages_of(self, layer_index: int) -> torch.Tensor:
        """All pages that a layer may have: ``[capacity, page_bytes]``, in place."""
        return self._pages[layer_index]

    def reserve(self, num_pages: int, device: torch.device) -> None:
        """Make room for that many pages, doubling so that growth stays linear."""
        num_layers, capacity, page_bytes = self._pages.shape
        if num_pages <= capacity and self._pages.device == device:
            return
        grown = max(num_pages, 2 * capacity, _FIRST_CAPACITY_PAGES)
        with torch.inference_mode(False):  # a pool first filled in inference mode is written outside it too
            pages = torch.empty(num_layers, grown, page_bytes, dtype=torch.uint8, device=device)
        pages[:, :capacity] = self._pages
        self._pages = pages

    def announce(self) -> None:
        """Tell the listener of pages that all layers have sealed since the last call.

        A page made from infinities or NaNs, and all pages after it, are kept to this sequence.
        """
        for index in range(self._num_announced, self.num_pages):
            self._num_announced = index + 1
            if self._on_page is not None and all(layer.is_finite for layer in self._layers):
                self._on_page(index, self.page(index))


class TQLayer(CacheLayerMixin):
    """One layer of a `TQCache`: raw sinks, `num_pages` compressed pages and a raw tail.

    `is_finite` says that no page so far was made from an infinity or a NaN.
    """

    def __init__(self, cache: TQCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._index = index
        self.num_pages = 0
        self.is_finite = True
        self._tail_keys = self._tail_values = torch.empty(0)
        self._sink_keys = self._sink_values = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Where the tail is."""
        return self._tail_keys.device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start an empty tail of the dtype and on the device of the first tokens."""
        if key_states.shape[0] != 1:
            raise ValueError(f"TQCache holds one sequence, not a batch of {key_states.shape[0]}")
        self._tail_keys, self._tail_values = key_states[:, :, :0], value_states[:, :, :0]
        self._sink_keys, self._sink_values = self._tail_keys, self._tail_values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, num_kv_heads, num_new, head_dim]``; returns the raw tail, marked with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._tail_keys = torch.cat((self._tail_keys, key_states), dim=2)
        self._tail_values = torch.cat((self._tail_values, value_states), dim=2)
        if self._sink_keys.shape[2] < NUM_SINKS:
            self._sink_keys, self._sink_values = (
                self._tail_keys[:, :, :NUM_SINKS],
                self._tail_values[:, :, :NUM_SINKS],
            )
        marked = self._tail_keys.view(self._tail_keys.shape)
        setattr(marked, _LAYER_ATTRIBUTE, self)
        return marked, self._tail_values

    def attend(
        self, query: torch.Tensor, *, softmax_scale: float, sliding_window: int | None
    ) -> torch.Tensor:
        """Attention of the newest ``[num_new, num_query_heads, head_dim]`` over all tokens, float32."""
        layout = self._cache.layout
        keys, values, num_sinks = self._tail_keys, self._tail_values, 0
        if self.num_pages:
            keys = torch.cat((self._sink_keys, keys), dim=2)
            values = torch.cat((self._sink_values, values), dim=2)
            num_sinks = NUM_SINKS
        output, _ = extend_attention(
            query,
            keys[0].transpose(0, 1),
            values[0].transpose(0, 1),
            self._cache.pages_of(self._index),
            torch.arange(self.num_pages, device=query.device),
            self.num_pages * layout.page_tokens,
            layout,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            num_sinks=num_sinks,
        )
        return output

    def seal_full_pages(self) -> None:
        """Compress the full pages of the tail; the last layer tells the cache."""
        page_tokens = self._cache.layout.page_tokens
        num_new = self._tail_keys.shape[2] // page_tokens
        if num_new:
            split = num_new * page_tokens
            keys, values = (
                side[0, :, :split].transpose(0, 1) for side in (self._tail_keys, self._tail_values)
            )
            self.is_finite &= bool(torch.isfinite(keys).all() and torch.isfinite(values).all())
            self._cache.reserve(self.num_pages + num_new, self._tail_keys.device)
            target = self._cache.pages_of(self._index)[self.num_pages : self.num_pages + num_new]
            target.copy_(quantize(keys, values, self._cache.layout))
            self._tail_keys, self._tail_values = (
                self._tail_keys[:, :, split:],
                self._tail_values[:, :, split:],
            )
            self.num_pages += num_new
        if self._index == len(self._cache.layers) - 1:
            self._cache.announce()

    def start_after(self, num_pages: int) -> None:
        """Go on after that many pages, which the cache has in place of the raw tokens so far."""
        self._tail_keys, self._tail_values = self._tail_keys[:, :, :0], self._tail_values[:, :, :0]
        self.num_pages = num_pages

    def get_seq_length(self) -> int:
        """Tokens in pages and tail."""
        tail = self._tail_keys.shape[2] if self.is_initialized else 0
        return self.num_pages * self._cache.layout.page_tokens + tail

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the new queries may see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
