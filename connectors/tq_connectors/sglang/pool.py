"""TQTokenToKVPool: SGLang's pool of keys and values, holding compressed pages."""

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from tq_connectors.engine.layouts import layout_for
from tq_connectors.sglang.page_rows import num_pairs, pair_of
from tq_kernels import PageLayout


class TQTokenToKVPool(MHATokenToKVPool):
    """Pages of all layers of a rank, two layers for each of SGLang's (`page_rows`).

    Only `backend.TurboQuantBackend` writes and reads tokens; everything else moves rows, and reads what they
    are from `page_layout`, `first_layer` and `num_model_layers`. Page 0 is what SGLang calls padding.

    Args:
        size: Tokens, a multiple of page_size.
        page_size: Tokens of a page.
        dtype_name: What `--kv-cache-dtype` says.
        head_num: KV heads of this rank.
        head_dim: Channels of a key and of a value.
        layer_num: Layers of this rank.
        start_layer: The first of them.
        others: As SGLang's class has them.

    Raises:
        ValueError: A shape that pages cannot have; the message names it.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        *,
        dtype_name: str,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_num: int,
        start_layer: int | None = None,
        end_layer: int | None = None,
        v_head_dim: int | None = None,
        **others: Any,
    ) -> None:
        if size % page_size:
            raise ValueError(f"a pool of {size} tokens has no whole number of pages of {page_size}")
        self.page_layout: PageLayout = layout_for(
            dtype_name, head_dim=head_dim, num_kv_heads=head_num, page_tokens=page_size
        )
        self.first_layer = start_layer or 0
        self.num_model_layers = layer_num
        super().__init__(
            size,
            page_size,
            dtype=dtype,
            head_num=head_num,
            head_dim=self.page_layout.slot_bytes,
            layer_num=num_pairs(layer_num),
            start_layer=0,
            end_layer=num_pairs(layer_num),
            **others,
        )
        if self.kv_cache_layout != "nhd":
            raise ValueError(f"compressed pages are rows of tokens, not {self.kv_cache_layout}")

    def pages(self, layer_id: int) -> torch.Tensor:
        """``[num_pages, page_bytes]`` uint8 of a layer, when what is being loaded into it has come."""
        layer = layer_id - self.first_layer
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(pair_of(layer))
        buffer: torch.Tensor = (self.v_buffer if layer % 2 else self.k_buffer)[pair_of(layer)]
        return buffer.view(-1, self.page_layout.page_bytes)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Rows ``[size + page_size, head_num, slot_bytes]`` of a layer, keys and values together."""
        return self.pages(layer_id).view(-1, self.head_num, self.head_dim)

    get_value_buffer = get_key_buffer

    def set_kv_buffer(self, *_: Any, **__: Any) -> None:
        """Refused: a token is quantized into its page, which needs to know more than its slot."""
        raise NotImplementedError("compressed pages are written by the attention backend turboquant alone")

    set_kv_buffer_prefix_valid = set_kv_buffer
    move_kv_cache = set_kv_buffer

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None) -> list[torch.Tensor]:
        """The pages of these slots, whole, on the CPU: one ``[num_pages, page_bytes]`` for each buffer."""
        pages = self._pages_of(indices)
        return [buffer[pages].to("cpu") for buffer in self._page_buffers()]

    def load_cpu_copy(
        self, kv_cache_cpu: Sequence[torch.Tensor], indices: torch.Tensor, mamba_indices: Any = None
    ) -> None:
        """Write pages that `get_cpu_copy` took into those of other slots."""
        pages = self._pages_of(indices)
        for buffer, copy in zip(self._page_buffers(), kv_cache_cpu, strict=True):
            buffer[pages] = copy.to(buffer.device)

    def _page_buffers(self) -> list[torch.Tensor]:
        page_bytes = self.page_layout.page_bytes
        return [buffer.view(-1, page_bytes) for buffer in [*self.k_buffer, *self.v_buffer]]

    def _pages_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Pages of a sequence's slots, which begin with a page."""
        page_tokens = self.page_layout.page_tokens
        return indices[::page_tokens] // page_tokens
