"""TQCache: a transformers cache of compressed pages, with the newest tokens raw until they fill a page."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tq_connectors.model_layout import ModelLayout
from tq_kernels.layout import PageLayout
from tq_kernels.reference import quantize
from tq_kernels.reference_attention import extend_attention

_LAYER_ATTRIBUTE = "_tq_layer"
_FIRST_CAPACITY_PAGES = 8

NUM_SINKS = 4
"""Tokens at the start of a sequence whose keys and values stay raw."""

PageListener = Callable[["TQCache"], None]
"""Called with the cache when all layers have sealed more pages; `num_sound_pages` of them may be shared."""

Probe = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with a layer's index, its new queries and all its raw keys, each ``[tokens, heads, head_dim]``."""


def layer_of(key: torch.Tensor) -> "TQLayer | None":
    """The cache layer that returned these keys, or None when another kind of cache did."""
    return getattr(key, _LAYER_ATTRIBUTE, None)


class TQCache(Cache):
    """Working cache of one sequence, for ``attn_implementation="tq"``.

    Pages are made once, when their last token arrives, and never made again from their own reconstruction.
    The first `NUM_SINKS` tokens, on which most attention rests, are read raw even where a page has them too.

    `num_sound_pages` counts the leading pages that all layers have and that were not made from infinities
    or NaNs, nor after one that was.

    Args:
        layout: Page layouts of the model's layers.
        on_page: Told when this cache has made pages; not of pages it was given.
        key_balance: ``[num_layers, num_kv_heads, head_dim]`` with which all its pages are made whose keys are
            rotated, or None.
        probe: Told what every layer attends with, for as long as nothing is compressed.
    """

    def __init__(
        self,
        layout: ModelLayout,
        on_page: PageListener | None = None,
        *,
        key_balance: torch.Tensor | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.layout = layout
        self.key_balance = key_balance
        self.probe = probe
        self.num_sound_pages = 0
        self.on_page = on_page
        self._layers = [TQLayer(self, index, pages) for index, pages in enumerate(layout.by_layer)]
        super().__init__(layers=list(self._layers))

    @property
    def num_pages(self) -> int:
        """Pages that every layer has: those of the last one, which seals last."""
        return self._layers[-1].num_pages

    def preload(self, pages: Iterable[memoryview]) -> int:
        """Continue with pages from the store in place of the tokens that the cache holds.

        Args:
            pages: For each page its bytes in all layers, as `page` gives them, in order of position.

        Returns:
            The number of pages that came; without any, the cache is as it was.

        Raises:
            ValueError: The cache does not hold just the sinks.
        """
        if self.get_seq_length() != NUM_SINKS:
            raise ValueError(f"pages can be loaded after exactly the first {NUM_SINKS} tokens")
        num_loaded, sizes = 0, [pages.page_bytes for pages in self.layout.by_layer]
        for page in pages:
            # a copy, because torch refuses to look at memory that it may not write
            by_layer = torch.frombuffer(bytearray(page), dtype=torch.uint8).split(sizes)
            for layer, layer_page in zip(self._layers, by_layer, strict=True):
                layer.slots(num_loaded, 1).copy_(layer_page)
            num_loaded += 1
        if num_loaded:
            for layer in self._layers:
                layer.start_after(num_loaded)
        self.num_sound_pages = num_loaded
        return num_loaded

    def page(self, index: int) -> torch.Tensor:
        """Bytes of one page in all layers, layer after layer: ``[page_bytes]`` on the CPU, a copy."""
        return torch.cat([layer.slots(index, 1)[0].cpu() for layer in self._layers])

    def check_pass(self) -> None:
        """Refuse to go on after a forward pass that did not attend in every layer.

        Raises:
            ValueError: An exception ended the last pass, or the model does not attend with ``"tq"``.
        """
        lengths = {layer.get_seq_length() for layer in self._layers}
        if len(lengths) > 1 or not all(layer.has_attended for layer in self._layers):
            raise ValueError(
                'the last pass over this cache did not finish, or not with attn_implementation="tq"; '
                "open another cache"
            )

    def finish_pass(self) -> None:
        """Tell the listener of pages that all layers have sealed since the last pass."""
        if self.num_pages > self.num_sound_pages and all(layer.is_finite for layer in self._layers):
            self.num_sound_pages = self.num_pages
            if self.on_page is not None:
                self.on_page(self)


class TQLayer(CacheLayerMixin):
    """One layer of a `TQCache`: raw sinks, `num_pages` compressed pages and a raw tail.

    `is_finite` says that no page so far was made from an infinity or a NaN, `has_attended` that there was
    attention over the tokens of the last update.
    """

    def __init__(self, cache: TQCache, index: int, layout: PageLayout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layout = layout
        self.index = index
        self.num_pages = 0
        self.is_finite = True
        self.has_attended = True
        self._pool = torch.empty(0, layout.page_bytes, dtype=torch.uint8)
        self._tail_keys = self._tail_values = torch.empty(0)
        self._sink_keys = self._sink_values = torch.empty(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start an empty tail of the dtype and on the device of the first tokens."""
        self._tail_keys, self._tail_values = key_states[:, :, :0], value_states[:, :, :0]
        self._sink_keys, self._sink_values = self._tail_keys, self._tail_values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, num_kv_heads, num_new, head_dim]``; returns the raw tail, marked with this layer.

        Raises:
            ValueError: A batch, or the last forward pass did not finish.
        """
        if key_states.shape[0] != 1:
            raise ValueError(f"TQCache holds one sequence, not a batch of {key_states.shape[0]}")
        if self.index == 0:
            self._cache.check_pass()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.has_attended = False
        self._tail_keys = torch.cat((self._tail_keys, key_states), dim=2)
        self._tail_values = torch.cat((self._tail_values, value_states), dim=2)
        if self._sink_keys.shape[2] < NUM_SINKS:
            # copies here and below: a slice would keep the whole prompt in memory
            self._sink_keys = self._tail_keys[:, :, :NUM_SINKS].clone()
            self._sink_values = self._tail_values[:, :, :NUM_SINKS].clone()
        marked = self._tail_keys.view(self._tail_keys.shape)
        setattr(marked, _LAYER_ATTRIBUTE, self)
        return marked, self._tail_values

    def attend(
        self, query: torch.Tensor, *, softmax_scale: float, sliding_window: int | None
    ) -> torch.Tensor:
        """Attention of the newest ``[num_new, num_query_heads, head_dim]`` over all tokens, float32."""
        layout = self._layout
        keys, values, num_sinks = self._tail_keys, self._tail_values, 0
        if self._cache.probe is not None and not self.num_pages:
            self._cache.probe(self.index, query, keys[0].transpose(0, 1))
        if self.num_pages:
            keys = torch.cat((self._sink_keys, keys), dim=2)
            values = torch.cat((self._sink_values, values), dim=2)
            num_sinks = NUM_SINKS
        output, _ = extend_attention(
            query,
            keys[0].transpose(0, 1),
            values[0].transpose(0, 1),
            self._pool,
            torch.arange(self.num_pages, device=query.device),
            self.num_pages * layout.page_tokens,
            layout,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            num_sinks=num_sinks,
            key_balance=self._key_balance,
        )
        return output

    def finish_pass(self) -> None:
        """Compress the full pages of the tail, after attention over it; the last layer tells the cache."""
        self.has_attended = True
        page_tokens = self._layout.page_tokens
        num_new = self._tail_keys.shape[2] // page_tokens
        if num_new:
            split = num_new * page_tokens
            keys, values = (
                side[0, :, :split].transpose(0, 1) for side in (self._tail_keys, self._tail_values)
            )
            self.is_finite &= bool(torch.isfinite(keys).all() and torch.isfinite(values).all())
            pages = quantize(keys, values, self._layout, key_balance=self._key_balance)
            self.slots(self.num_pages, num_new).copy_(pages)
            self._tail_keys = self._tail_keys[:, :, split:].clone()
            self._tail_values = self._tail_values[:, :, split:].clone()
            self.num_pages += num_new
        if self.index == len(self._cache.layers) - 1:
            self._cache.finish_pass()

    @property
    def _key_balance(self) -> torch.Tensor | None:
        balance = self._cache.key_balance
        if balance is None or not self._layout.spec.key.rotated:
            return None
        return balance[self.index].to(self._tail_keys.device)

    def slots(self, first: int, count: int) -> torch.Tensor:
        """Pages from `first` on, in place: ``[count, page_bytes]``; the pool doubles when it is too small."""
        capacity, page_bytes = self._pool.shape
        if first + count > capacity:
            grown = max(first + count, 2 * capacity, _FIRST_CAPACITY_PAGES)
            with torch.inference_mode(False):  # a pool first filled in inference mode is written outside it
                pool = torch.empty(grown, page_bytes, dtype=torch.uint8, device=self._tail_keys.device)
            pool[:capacity] = self._pool
            self._pool = pool
        return self._pool[first : first + count]

    def start_after(self, num_pages: int) -> None:
        """Go on after that many pages, which the pool has in place of the raw tokens so far."""
        self._tail_keys, self._tail_values = self._tail_keys[:, :, :0], self._tail_values[:, :, :0]
        self.num_pages = num_pages

    def get_seq_length(self) -> int:
        """Tokens in pages and tail."""
        tail = self._tail_keys.shape[2] if self.is_initialized else 0
        return self.num_pages * self._layout.page_tokens + tail

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the new queries may see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "TQCache holds one sequence that only grows, without beam search, assisted decoding, cropping "
            "or reset; open another cache"
        )

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse
