"""TurboQuantBackend: attention of SGLang on compressed pages."""

import logging
import os
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.sink_pool import SinkPool
from tq_connectors.engine.workspaces import DecodeWorkspaces
from tq_connectors.sglang.balance import key_balance
from tq_connectors.sglang.fresh import flash_attention_3
from tq_connectors.sglang.installed import require_hooks
from tq_connectors.sglang.page_rows import row_bytes, sink_rows
from tq_connectors.sglang.pool import TQTokenToKVPool
from tq_connectors.sglang.prefill import Prefill
from tq_connectors.sglang.steps import Batch, Steps
from tq_kernels.decode_attention import DecodeWorkspace, decode_workspace

logger = logging.getLogger(__name__)


class TurboQuantBackend(AttentionBackend):
    """Writes new tokens into pages, and attends to the pages as they are.

    A decode is one launch over block tables, and may be captured in a CUDA graph: tables lie in memory that
    stays, and are filled before each replay. Prefill attends to new tokens as they came, and to the prefix
    in pages. The host never waits for the device.

    Args:
        runner: SGLang's `ModelRunner`, its pools made.

    Raises:
        RuntimeError: A hook of ours did not take.
        ValueError: The pool is none of ours, as SGLang builds another for this model.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        require_hooks()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, TQTokenToKVPool):
            raise ValueError(
                f"the attention backend turboquant reads compressed pages; this model has a "
                f"{type(pool).__name__}, which keeps none"
            )
        self._pool, layout = pool, pool.page_layout
        self._device = torch.device(runner.device)
        self._max_tokens = min(runner.model_config.context_len, pool.size)
        model, parallel = runner.model_config, get_parallel()
        self._num_query_heads = model.num_attention_heads // parallel.attn_tp_size
        balance = key_balance(
            os.environ,
            layout,
            layers=range(pool.first_layer, pool.first_layer + pool.num_model_layers),
            num_model_layers=model.num_hidden_layers,
            total_kv_heads=model.get_total_num_kv_heads(),
            tp_rank=parallel.attn_tp_rank,
            tp_size=parallel.attn_tp_size,
        )
        self._balance = None if balance is None else balance.to(self._device)
        self._sinks = SinkPool(
            layout,
            num_layers=pool.num_model_layers,
            num_rows=sink_rows(layout, pool.size, runner.req_to_token_pool.size, runner.dtype.itemsize),
            dtype=runner.dtype,
            device=self._device,
        )
        self._sinks.bind(pool.size // layout.page_tokens + 1)
        self._steps = Steps(
            layout,
            req_to_token=runner.req_to_token_pool.req_to_token,
            first_layer=partial(pool.pages, pool.first_layer),
            sinks=self._sinks,
            num_query_heads=self._num_query_heads,
        )
        fresh = flash_attention_3(
            self._num_query_heads,
            layout.num_kv_heads,
            layout.head_dim,
            runner.dtype,
            self._device,
            os.environ,
        )
        self._prefill = Prefill(
            layout, max_tokens=self._max_tokens, dtype=runner.dtype, device=self._device, fresh=fresh
        )
        if self._device.type == "cuda":
            self.compile_kernels(runner.model, runner.dtype)
        self._layers: dict[int, PagedAttention] = {}
        self._graphs: Batch | None = None
        self._workspaces: DecodeWorkspaces | None = None
        self._workspace: DecodeWorkspace | None = None
        self._batch: Batch | None = None
        logger.info(
            "tq-store: %d tokens in pages of %d, %d bytes a token and layer; prefill by %s",
            pool.size,
            layout.page_tokens,
            row_bytes(layout),
            "FlashAttention 3" if fresh else "tq_kernels",
        )

    def compile_kernels(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Compile what a model launches, with all its windows and caps, before its first request."""
        layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
        kinds = [self._on_pages(0, **_mask_of(layer)) for layer in layers]
        self._prefill.compile_kernels(kinds, self._num_query_heads, dtype)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Take the memory that graphs of up to max_bs sequences know."""
        self._graphs = self._steps.empty(max_bs, max_bs, self._max_tokens)
        self._workspaces = DecodeWorkspaces(
            self._pool.page_layout,
            num_query_heads=self._num_query_heads,
            max_seqs=max_bs,
            max_tokens=self._max_tokens,
            max_rows=1,
            device=self._device,
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a sequence that pads a batch."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fill the tables of a decode that is about to be captured or replayed."""
        if self._graphs is None or self._workspaces is None:
            raise RuntimeError("init_cuda_graph_state comes first")
        num_seqs = forward_batch.batch_size
        batch = self._graphs.of_decode(num_seqs)
        self._fill_decode(batch, forward_batch)
        if in_capture:
            self._batch, self._workspace = batch, self._workspaces.get(num_seqs)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Everything that an eager pass needs."""
        mode, num_seqs = forward_batch.forward_mode, forward_batch.batch_size
        self._batch = self._workspace = None
        if mode.is_decode():
            self._batch = self._steps.empty(num_seqs, num_seqs, self._max_tokens)
            self._fill_decode(self._batch, forward_batch)
            pages = self._batch.block_table.shape[1]
            self._workspace = decode_workspace(
                self._pool.page_layout, num_seqs, self._num_query_heads, pages, self._device
            )
        elif mode.is_extend_without_speculative():
            self._batch = self._steps.extend(
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                forward_batch.extend_seq_lens,
                forward_batch.out_cache_loc,
                prefix_lens_host=forward_batch.extend_prefix_lens_cpu,
                new_lens_host=forward_batch.extend_seq_lens_cpu,
            )
        elif not mode.is_idle():
            raise NotImplementedError(f"the attention backend turboquant does not serve {mode.name}")

    def _fill_decode(self, batch: Batch, forward_batch: Any) -> None:
        self._steps.fill_decode(
            batch,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            forward_batch.out_cache_loc,
        )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        """One new token of every sequence: written, then attended to with all before it."""
        attention, batch, pages = self._written(layer, k, v, save_kv_cache, others, one_per_page=True)
        if self._workspace is None:
            raise RuntimeError("a decode was not prepared")
        out = torch.empty_like(q)
        attention.decode(
            self._by_heads(q),
            pages,
            batch.block_table,
            batch.lengths,
            sink_rows=batch.sink_rows,
            workspace=self._workspace,
            out=self._by_heads(out),
        )
        return out

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        """New tokens of every sequence: written, and attended to as they came."""
        attention, batch, pages = self._written(layer, k, v, save_kv_cache, others, one_per_page=False)
        out = torch.empty_like(q)
        self._prefill.attend(attention, self._by_heads(q), k, v, pages, batch, self._by_heads(out))
        return out

    def _written(
        self,
        layer: Any,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        save: bool,
        others: dict[str, Any],
        *,
        one_per_page: bool,
    ) -> tuple[PagedAttention, Batch, torch.Tensor]:
        """The layer's attention, the batch, and the layer's pages with the new tokens in them."""
        batch = self._batch
        if batch is None:
            raise RuntimeError("attention was called before its metadata were made")
        if keys is None or values is None:
            raise NotImplementedError("compressed pages do not serve layers that share keys and values")
        if unknown := sorted(name for name, value in others.items() if value is not None):
            raise NotImplementedError(f"the attention backend turboquant does not serve {', '.join(unknown)}")
        attention = self._attention_of(layer)
        pages = self._pool.pages(layer.layer_id)
        if save:
            attention.write(
                keys,
                values,
                batch.slots[: len(keys)],
                pages,
                seed_pages=batch.seed_pages[: len(keys)],
                sink_slots=batch.sink_slots[: len(keys)],
                one_per_page=one_per_page,
            )
            if layer.layer_id == self._pool.first_layer:
                self._steps.first_layer_written(batch)
        return attention, batch, pages

    def _attention_of(self, layer: Any) -> PagedAttention:
        if layer.layer_id not in self._layers:
            self._layers[layer.layer_id] = self._make_attention(layer)
        return self._layers[layer.layer_id]

    def _make_attention(self, layer: Any) -> PagedAttention:
        if layer.is_cross_attention or str(layer.attn_type.value) != "decoder":
            raise NotImplementedError("the attention backend turboquant serves causal attention alone")
        return self._on_pages(
            layer.layer_id - self._pool.first_layer,
            **_mask_of(layer),
        )

    def _on_pages(self, number: int, **options: Any) -> PagedAttention:
        """The attention of one of this process's layers."""
        return PagedAttention(
            layout=self._pool.page_layout,
            key_balance=None if self._balance is None else self._balance[number],
            sink_keys=self._sinks.keys[number],
            sink_values=self._sinks.values[number],
            **options,
        )

    def _by_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self._num_query_heads, self._pool.page_layout.head_dim)


def _mask_of(layer: Any) -> dict[str, Any]:
    """What a layer of SGLang does with scores."""
    return {
        "softmax_scale": layer.scaling,
        # SGLang counts the positions before a query, we count its own as well
        "sliding_window": layer.sliding_window_size + 1 if layer.sliding_window_size > -1 else None,
        "softcap": layer.logit_cap or None,
    }
