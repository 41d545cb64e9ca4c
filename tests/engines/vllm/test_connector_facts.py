"""Which of vLLM's caches our connector takes."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tq_connectors.vllm.connector_facts import engine_facts
from tq_store.errors import ConfigError

SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
CONFIG = SimpleNamespace(
    cache_config=SimpleNamespace(cache_dtype="auto", kv_cache_layout="LBHNC"),
    model_config=SimpleNamespace(model="m", dtype=torch.bfloat16),
    parallel_config=SimpleNamespace(
        tensor_parallel_size=1,
        world_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
    ),
)


def cache_of(*specs):
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)


def test_layers_with_full_attention_are_served():
    facts = engine_facts(CONFIG, cache_of(FullAttentionSpec(**SHAPE)), 64)
    assert (facts.dtype, facts.blocks_per_chunk, facts.is_replicated) == ("bfloat16", 2, False)
    assert facts.platform == "cpu"


@pytest.mark.parametrize(
    "specs",
    [
        [SlidingWindowSpec(**SHAPE, sliding_window=128)],
        [MLAAttentionSpec(**SHAPE)],
        [FullAttentionSpec(**SHAPE), FullAttentionSpec(**SHAPE)],
    ],
    ids=["sliding window", "MLA", "two groups"],
)
def test_all_others_are_refused(specs):
    with pytest.raises(
        ConfigError, match=f"all have full attention, and this one has .*{type(specs[0]).__name__}"
    ):
        engine_facts(CONFIG, cache_of(*specs), 64)
