"""What a step's attention needs to know, the same for all layers of a group, made before its graph runs."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from tq_connectors.engine.inflate import Inflater
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.short_chunks import Chunk, ShortChunks, short_chunks
from tq_connectors.engine.warm_up import compile_kernels
from tq_connectors.engine.workspaces import DecodeWorkspaces
from tq_connectors.vllm.balance import key_balances
from tq_connectors.vllm.batch import CachedChunk, ColdPrompts, DecodeRows, decode_rows, prefill_parts
from tq_connectors.vllm.group import LayerGroup, PageStep
from tq_kernels.decode_attention import DecodeWorkspace
from tq_kernels.decode_plan import MAX_ROWS
from tq_kernels.extend_attention import ExtendWorkspace, extend_workspace
from tq_kernels.extend_plan import WORKSPACE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class TQMetadata(AttentionMetadata):
    """A step.

    Args:
        group: Its layers.
        num_tokens: Tokens of the batch, with those that fill up a graph.
        slot_mapping: ``[num_tokens]`` where each token goes, or -1.
        block_table: ``[num_seqs, max_pages]`` int32.
        lengths: ``[num_seqs]`` int32 tokens of each sequence, those of this step included.
        pages: What the step does to pages.
        decode: Sequences that read everything from pages, or None.
        decode_workspace: For these.
        cold: Prompts without anything in the cache.
        chunks: Further tokens of sequences that have some there.
        short: Short chunks after a cached prefix, all together.
        chunk_workspace: For long ones.
        inflater: For those that are long, where vLLM has a dense attention; else None.
    """

    group: LayerGroup
    num_tokens: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    pages: PageStep
    decode: DecodeRows | None
    decode_workspace: DecodeWorkspace | None
    cold: list[ColdPrompts]
    chunks: list[CachedChunk]
    short: ShortChunks | None
    chunk_workspace: ExtendWorkspace
    inflater: Inflater | None

    @property
    def is_plain_decode(self) -> bool:
        """Whether every sequence brings one token, which so shares its page with no other of the step."""
        return (
            self.decode is not None and self.decode.rows == 1 and not (self.cold or self.chunks or self.short)
        )


class TQMetadataBuilder(AttentionMetadataBuilder[TQMetadata]):
    """Makes the metadata of a group of layers. What graphs read lies in buffers that stay where they are."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        max_rows = self.reorder_batch_threshold or 1
        if max_rows > MAX_ROWS:
            raise ValueError(
                f"{max_rows - 1} drafts at once are too many for pages; {MAX_ROWS - 1} are served"
            )
        if vllm_config.parallel_config.use_ubatching:
            raise ValueError("compressed pages do not serve microbatches (--enable-dbo)")
        known = vllm_config.compilation_config.static_forward_context
        layers = {name: known[name] for name in layer_names}
        first = layers[layer_names[0]]
        layout = layout_for(
            first.kv_cache_dtype,
            head_dim=kv_cache_spec.head_size,
            num_kv_heads=kv_cache_spec.num_kv_heads,
            page_tokens=kv_cache_spec.block_size,
        )
        scheduler = vllm_config.scheduler_config
        max_seqs = max(scheduler.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._group = LayerGroup(
            layers,
            layout,
            known=known,
            keeps_sinks=_keeps_sinks(vllm_config),
            key_balances=key_balances(
                os.environ,
                layout,
                [extract_layer_index(name) for name in layers],
                num_model_layers=model.hf_text_config.num_hidden_layers,
                total_kv_heads=model.get_total_num_kv_heads(),
                tp_rank=parallel.rank % parallel.tensor_parallel_size,
                tp_size=parallel.tensor_parallel_size,
            ),
            max_seqs=max_seqs,
            max_tokens=max(scheduler.max_num_batched_tokens, max_seqs * max_rows),
            dtype=model.dtype,
            device=device,
        )
        max_tokens = model.max_model_len
        self._decode_workspaces = DecodeWorkspaces(
            layout,
            num_query_heads=first.num_heads,
            max_seqs=max_seqs,
            max_tokens=max_tokens,
            max_rows=max_rows,
            device=device,
        )
        self._chunk_workspace = extend_workspace(layout, min(WORKSPACE_TOKENS, max_tokens), device)
        self._layout, self._num_query_heads = layout, first.num_heads
        self._inflater = None
        if first.impl.flash is not None:
            self._inflater = Inflater(layout, dtype=model.dtype, device=device, max_tokens=max_tokens)
        if device.type == "cuda":
            compile_kernels(
                [
                    (
                        self._group.attention(name),
                        None if layer.impl.flash is None else layer.impl.flash.dense,
                    )
                    for name, layer in layers.items()
                ],
                num_query_heads=first.num_heads,
                dtype=model.dtype,
                device=device,
                inflater=self._inflater,
                workspace=self._chunk_workspace,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TQMetadata:
        """The metadata of a step. Nothing here waits for the device.

        Raises:
            ValueError: Attention that is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("attention over compressed pages is causal")
        num_tokens, num_seqs = common.num_actual_tokens, common.num_reqs
        query_start = common.query_start_loc[: num_seqs + 1]
        block_table, device_lengths = common.block_table_tensor[:num_seqs], common.seq_lens[:num_seqs]
        starts = common.query_start_loc_cpu[: num_seqs + 1].tolist()
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            common, self.reorder_batch_threshold or 1
        )
        decode = decode_rows(starts, query_start, num_decodes, num_tokens)
        # lengths may have to be waited for, and only prefill asks for them
        lengths = _host_lengths(common) if num_prefills else []
        cold, chunks = prefill_parts(starts, lengths, query_start, num_decodes)
        pages = self._group.prepare(
            block_table,
            device_lengths,
            query_start,
            common.slot_mapping[:num_tokens],
            opens=bool(cold),
            num_decodes=num_decodes,
            num_decode_tokens=starts[num_decodes],
        )
        named = [
            Chunk(
                seq=chunk.seq,
                first_token=chunk.tokens.start,
                num_new=chunk.tokens.stop - chunk.tokens.start,
                prefix_len=chunk.prefix_len,
            )
            for chunk in chunks
        ]
        return TQMetadata(
            group=self._group,
            num_tokens=num_tokens,
            slot_mapping=common.slot_mapping[:num_tokens],
            block_table=block_table,
            lengths=device_lengths,
            pages=pages,
            decode=decode,
            decode_workspace=None
            if decode is None
            else self._decode_workspaces.get(decode.num_seqs, decode.rows),
            cold=cold,
            chunks=[each for each, chunk in zip(chunks, named, strict=True) if not chunk.is_short],
            short=short_chunks(
                named,
                block_table,
                pages.sink_rows,
                self._layout,
                num_query_heads=self._num_query_heads,
            ),
            chunk_workspace=self._chunk_workspace,
            inflater=self._inflater,
        )


_LOADS_BETWEEN_STEPS = ("TQStoreConnector", "OffloadingConnector")
"""Connectors that fill pages of sequences before these are in a step."""


def _keeps_sinks(config: VllmConfig) -> bool:
    """Whether pages are what they will be when a step is prepared: raw sinks are believed by their look."""
    transfer = config.kv_transfer_config
    return transfer is None or transfer.kv_connector in (None, *_LOADS_BETWEEN_STEPS)


def _host_lengths(common: CommonAttentionMetadata) -> list[int]:
    """Tokens of each sequence: exact while it prefills, which is all that is asked of them, else a bound."""
    lengths: Any = common.seq_lens_cpu_upper_bound
    numbers: list[int] = (common.seq_lens if lengths is None else lengths)[: common.num_reqs].tolist()
    return numbers
