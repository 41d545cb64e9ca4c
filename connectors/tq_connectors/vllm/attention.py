"""A layer's attention on compressed pages, as vLLM calls it."""

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.vllm.batch import CachedChunk, ColdPrompts, DecodeRows
from tq_connectors.vllm.flash import flash_prefill
from tq_connectors.vllm.group import pages_of
from tq_connectors.vllm.metadata import TQMetadata
from tq_kernels.decode_plan import MAX_GROUP
from tq_kernels.layout import PageLayout


class TQAttentionImpl(AttentionImpl[TQMetadata]):
    """Writes a step's keys and values into pages, then attends in up to three ways.

    Decode rows read pages alone, their own tokens included. Cold prompts attend to what is raw. A chunk after
    a cached prefix attends to the prefix in pages and, raw, to itself.

    Raises:
        ValueError: Attention that pages do not serve; the message says what.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        unserved = {
            "ALiBi": alibi_slopes is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that read the cache of another": kv_sharing_target_layer_name is not None,
            f"{num_heads} query heads over {self.num_kv_heads} KV heads, more than {MAX_GROUP} for each": (
                num_heads > MAX_GROUP * self.num_kv_heads
            ),
        }
        for what, is_asked in unserved.items():
            if is_asked:
                raise ValueError(f"attention over compressed pages does not serve {what}")
        self.flash = flash_prefill(
            head_size, softmax_scale=self.scale, sliding_window=sliding_window, softcap=self.logits_soft_cap
        )

    def on_pages(
        self,
        layout: PageLayout,
        *,
        sink_keys: torch.Tensor | None,
        sink_values: torch.Tensor | None,
        key_balance: torch.Tensor | None,
    ) -> PagedAttention:
        """What this layer does with pages, once they are known.

        Args:
            layout: Of its pages.
            sink_keys: ``[num_rows, num_sinks, num_kv_heads, head_dim]``, where first tokens are kept.
            sink_values: The same shape.
            key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys are divided, or None.
        """
        return PagedAttention(
            layout=layout,
            softmax_scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.logits_soft_cap,
            key_balance=key_balance,
            sink_keys=sink_keys,
            sink_values=sink_values,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TQMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write and attend.

        Args:
            layer: vLLM's layer.
            query: ``[num_tokens or more, num_heads, head_size]``.
            key: ``[num_tokens or more, num_kv_heads, head_size]``.
            value: The same shape.
            kv_cache: ``[pages, num_kv_heads, page_tokens, slot_bytes]`` uint8.
            attn_metadata: The step, or None in a run that only measures memory.
            output: Written and returned: the query's shape.
            output_scale: Not served.
            output_block_scale: Not served.

        Raises:
            NotImplementedError: A quantized output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention over compressed pages does not quantize its output")
        if attn_metadata is None:
            return output.fill_(0)
        step, name = attn_metadata, layer.layer_name
        attention = step.group.attention(name)
        pages = pages_of(kv_cache, attention.layout)
        attention.write(
            key[: step.num_tokens],
            value[: step.num_tokens],
            step.slot_mapping,
            pages,
            seed_pages=step.pages.seed_pages,
            sink_slots=step.pages.sink_slots,
            one_per_page=step.is_plain_decode,
        )
        step.group.after_write(name, pages, step.pages)
        if step.decode is not None:
            self._decode(attention, step, step.decode, query, pages, output)
        for prompts in step.cold:
            self._attend_raw(attention, step, prompts, (query, key, value), pages, output)
        if step.short is not None:
            step.short.attend(attention, query, pages, output)
        for chunk in step.chunks:
            self._attend_chunk(attention, step, chunk, (query, key, value), pages, output)
        return output

    def _attend_chunk(
        self,
        attention: PagedAttention,
        step: TQMetadata,
        chunk: CachedChunk,
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        pages: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        query, key, value = (each[chunk.tokens] for each in tokens)
        cached = (pages, step.block_table[chunk.seq], chunk.prefix_len)
        sink_row, out = step.pages.sink_rows[chunk.seq : chunk.seq + 1], output[chunk.tokens]
        inflater = step.inflater
        if self.flash and inflater and inflater.serves(attention, len(query), chunk.prefix_len):
            dense = self.flash.dense
            inflater.attend(attention, dense, query, key, value, *cached, sink_row=sink_row, out=out)
            return
        attention.extend(
            query, key, value, *cached, sink_row=sink_row, workspace=step.chunk_workspace, out=out
        )

    def _attend_raw(
        self,
        attention: PagedAttention,
        step: TQMetadata,
        prompts: ColdPrompts,
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        pages: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        if self.flash is not None:
            self.flash(*tokens, prompts, output)
            return
        first = prompts.first_token
        for seq, length in enumerate(prompts.lengths, prompts.first_seq):
            own = slice(first, first + length)
            query, key, value = (each[own] for each in tokens)
            attention.extend(
                query,
                key,
                value,
                pages,
                step.block_table[seq],
                0,
                sink_row=None,
                workspace=step.chunk_workspace,
                out=output[own],
            )
            first += length

    def _decode(
        self,
        attention: PagedAttention,
        step: TQMetadata,
        decode: DecodeRows,
        query: torch.Tensor,
        pages: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        shape = decode.num_seqs, decode.rows
        if decode.to_rows is None:
            rows, out = query[: decode.num_tokens], output[: decode.num_tokens]
        else:
            rows = query[decode.to_rows]
            out = torch.empty_like(rows)
        assert step.decode_workspace is not None  # comes with `decode`
        attention.decode(
            rows.unflatten(0, shape),
            pages,
            step.block_table[: decode.num_seqs],
            step.lengths[: decode.num_seqs],
            sink_rows=step.pages.sink_rows[: decode.num_seqs],
            workspace=step.decode_workspace,
            out=out.unflatten(0, shape),
        )
        if decode.to_tokens is not None:
            output[: decode.num_tokens] = out[decode.to_tokens]
