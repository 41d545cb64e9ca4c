"""vLLM's own objects for a model's attention, put together on a CPU as its engine core and worker do it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache

from tq_connectors.vllm import plugin

plugin.register()

CPU = torch.device("cpu")
MAX_MODEL_LEN = 2048
MAX_STORY = 400


def vllm_config(folder: Path, *, cache: dict[str, Any], model: dict[str, Any], **others: Any) -> VllmConfig:
    """A configuration for a Llama of two layers, 4 query and 2 KV heads of 32, unless `model` says more."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    } | model
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_MODEL_LEN
        ),
        cache_config=CacheConfig(**cache),
        device_config=DeviceConfig("cpu"),
        parallel_config=ParallelConfig(),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=MAX_MODEL_LEN,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
        ),
        **others,
    )


class ModelOnCpu:
    """Attention layers of a model with their caches, and a batch at a time through all of them.

    `windows` holds the sliding window of each layer, or None.
    """

    def __init__(
        self, config: VllmConfig, windows: Sequence[int | None] = (None, None), **layer: Any
    ) -> None:
        hf = config.model_config.hf_text_config
        self.config = config
        self.num_heads, self.num_kv_heads = hf.num_attention_heads, hf.num_key_value_heads
        self.head_dim = config.model_config.get_head_size()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with set_current_vllm_config(config):
                self.layers = {
                    f"model.layers.{index}.self_attn.attn": Attention(
                        self.num_heads,
                        self.head_dim,
                        self.head_dim**-0.5,
                        num_kv_heads=self.num_kv_heads,
                        cache_config=config.cache_config,
                        per_layer_sliding_window=window,
                        prefix=f"model.layers.{index}.self_attn.attn",
                        **layer,
                    )
                    for index, window in enumerate(windows)
                }
        finally:
            torch.set_default_dtype(before)
        current_platform.update_block_size_for_backend(config)

    def plan(self, memory_bytes: int) -> Any:
        """vLLM's plan for a pool of so many bytes."""
        specs = get_kv_cache_spec(self.config)
        backends = [layer.get_attn_backend() for layer in self.layers.values()]
        names = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        resolve_kv_cache_layout(self.config, [names], specs.values())
        groups = get_global_kv_cache_groups(self.config, [specs])
        (plan,) = get_kv_cache_configs(self.config, [specs], [memory_bytes], groups)
        return plan

    def allocate(self, memory_bytes: int = 4 << 20) -> "ModelOnCpu":
        """Make the caches and what prepares a step."""
        self.plan_made = self.plan(memory_bytes)
        self.groups, self.graph_support, sizes = init_attn_backend(self.plan_made, self.config, CPU)
        context = self.config.compilation_config.static_forward_context
        flat = [group for groups in self.groups for group in groups]
        init_kv_cache(context, self.plan_made, CPU, sizes, self.config, attn_groups=flat)
        return self

    def step(self, batch: "Sequence[tuple[Story, int]]", *, padded_seqs: int = 0, rows: int = 1) -> list[Any]:
        """Let stories go on by so many tokens each, all layers in turn.

        Args:
            batch: Stories in the order of the batch, which is the engine's: those that decode come first.
            padded_seqs: Sequences of nobody at the end, of `rows` tokens each, as in a captured graph.
            rows: See there.

        Returns:
            For each story and layer the outputs ``[new tokens, num_heads, head_dim]``.
        """
        counts = [count for _, count in batch]
        num_tokens = sum(counts) + padded_seqs * rows
        for story, count in batch:
            story.length += count
        starts = torch.tensor([0, *counts, *[0] * padded_seqs]).cumsum(0).int()
        lengths = torch.tensor([story.length for story, _ in batch] + [0] * padded_seqs).int()
        metadata = {}
        for number, groups in enumerate(self.groups):
            tables, slots = self._places(batch, starts, num_tokens, number)
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts.clone(),
                seq_lens=lengths,
                num_reqs=len(lengths),
                num_actual_tokens=num_tokens,
                max_query_len=max(counts),
                max_seq_len=int(lengths.max()),
                block_table_tensor=tables,
                slot_mapping=slots,
                seq_lens_cpu_upper_bound=lengths.clone(),
            )
            for group in groups:
                metadata |= dict.fromkeys(group.layer_names, group.build_metadata(common))
        outputs: list[list[torch.Tensor]] = [[] for _ in batch]
        for number, layer in enumerate(self.layers.values()):
            query, key, value = (
                torch.cat([each.new(number, count, side) for each, count in batch]) for side in range(3)
            )
            extra = num_tokens - sum(counts)
            query, key, value = (
                torch.cat((each, each[:1].expand(extra, -1, -1))).flatten(1) for each in (query, key, value)
            )
            with set_forward_context(metadata, self.config, num_tokens=num_tokens, slot_mapping={}):
                out = layer(query, key, value).unflatten(1, (self.num_heads, -1))
            for index, (_, count) in enumerate(batch):
                outputs[index].append(out[int(starts[index]) :][:count])
        return outputs

    def _places(
        self, batch: "Sequence[tuple[Story, int]]", starts: torch.Tensor, num_tokens: int, group: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table and slots of a group; groups lie in one memory, so each has blocks of its own."""
        spec = self.groups[group][0].kv_cache_spec
        size = spec.block_size
        tables = torch.zeros(len(starts) - 1, -(-MAX_MODEL_LEN // size), dtype=torch.int32)
        slots = torch.full((num_tokens,), -1)
        for index, (story, count) in enumerate(batch):
            tables[index, : len(story.blocks)] = torch.tensor(story.blocks) + 20 * group
            positions = torch.arange(story.length - count, story.length)
            first = int(starts[index])
            slots[first : first + count] = tables[index, positions // size].long() * size + positions % size
            if isinstance(spec, SlidingWindowSpec):
                # what no window of this step reaches is given back; the null block stands in its place
                tables[index, : max(0, int(positions[0]) - spec.sliding_window + 1) // size] = 0
        return tables, slots

    @property
    def builder(self) -> Any:
        """What prepares steps of the first group."""
        return self.groups[0][0].get_metadata_builder()

    @property
    def pages(self) -> dict[str, torch.Tensor]:
        """The cache of each layer."""
        return {name: layer.kv_cache for name, layer in self.layers.items()}

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return next(iter(self.layers.values())).kv_cache.shape[2]

    def story(
        self, seed: int, blocks: Sequence[int], *, shared: "Story | None" = None, prefix_len: int = 0
    ) -> "Story":
        """A sequence that lies in these blocks, or goes on from the first tokens of another."""
        return Story(self, seed, list(blocks), shared, prefix_len)


class Story:
    """Queries, keys and values of a made-up sequence in all layers: what attention over it must come to."""

    def __init__(
        self, model: ModelOnCpu, seed: int, blocks: list[int], shared: "Story | None", prefix_len: int
    ) -> None:
        self.blocks = blocks
        self.length = prefix_len
        random = torch.Generator().manual_seed(seed)
        heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        self._sides = [
            [torch.randn(MAX_STORY, count, model.head_dim, generator=random) for count in heads]
            for _ in model.layers
        ]
        # what all keys of a layer have in common is most of them in real models
        common = torch.randn(heads[1], model.head_dim, generator=torch.Generator().manual_seed(9))
        for number, layer in enumerate(self._sides):
            layer[1] += 2 * common
            if shared is not None:
                for side, theirs in zip(layer, shared._sides[number], strict=True):
                    side[:prefix_len] = theirs[:prefix_len]
            self._sides[number] = [side.bfloat16() for side in layer]

    def new(self, layer: int, count: int, side: int) -> torch.Tensor:
        """The newest queries (0), keys (1) or values (2) of a layer."""
        return self._sides[layer][side][self.length - count : self.length]

    def exact(self, layer: int, count: int, window: int | None = None) -> torch.Tensor:
        """Attention of the newest tokens over all, in float32: ``[count, num_heads, head_dim]``."""
        query, key, value = (side[: self.length].float().transpose(0, 1) for side in self._sides[layer])
        position = torch.arange(self.length)
        distance = position[-count:, None] - position
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return torch.nn.functional.scaled_dot_product_attention(
            query[:, -count:], key, value, attn_mask=mask, enable_gqa=True
        ).transpose(0, 1)
