"""Which layers take our backend, what the pool then holds, and what is refused with which words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines.vllm_stock.model_on_cpu import ModelOnCpu, vllm_config
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector as vllm_selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tq_connectors.vllm import selector

MEMORY_BYTES = 8 << 30
FLASH = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"


class Hopper:
    """A platform that chooses FlashAttention, or what it is told to, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def get_device_capability(self):
        return DeviceCapability(9, 0)

    def get_attn_backend_cls(self, selected_backend, attn_selector_config, num_heads=None):
        self.asked.append((selected_backend, attn_selector_config.kv_cache_dtype))
        return FLASH if selected_backend is None else selected_backend.get_path()


@pytest.fixture
def hopper(monkeypatch):
    platform = Hopper()
    monkeypatch.setattr(current_platform, "get_attn_backend_cls", selector._ByDtype(platform, "TQ"))
    vllm_selector._cached_get_attn_backend.cache_clear()
    yield platform
    vllm_selector._cached_get_attn_backend.cache_clear()


def llama_8b(num_layers=8):
    return {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": num_layers,
    }


@pytest.mark.parametrize(
    ("cache", "least"),
    [({}, 3.6), ({"block_size": 128}, 3.8)],
)
def test_a_pool_holds_so_many_times_the_tokens_of_bf16(tmp_path, hopper, cache, least):
    pools = {}
    for dtype in ("auto", "tq4"):
        config = vllm_config(tmp_path, cache={"cache_dtype": dtype, **cache}, model=llama_8b())
        model = ModelOnCpu(config, [None] * 8)
        plan = model.plan(MEMORY_BYTES)
        pools[dtype] = plan.num_blocks * plan.kv_cache_groups[0].kv_cache_spec.block_size
    assert pools["tq4"] / pools["auto"] > least


def test_layers_left_in_bf16_get_what_they_would_have_without_us(tmp_path, hopper):
    cache = {"cache_dtype": "tq4", "kv_cache_dtype_skip_layers": ["0", "1"]}
    model = ModelOnCpu(vllm_config(tmp_path, cache=cache, model=llama_8b(4)), [None] * 4)
    names = [layer.get_attn_backend().get_name() for layer in model.layers.values()]
    assert names == ["FLASH_ATTN", "FLASH_ATTN", "TQ", "TQ"]
    assert hopper.asked == [(None, "auto")]
    plan = model.plan(MEMORY_BYTES)
    (group,) = plan.kv_cache_groups
    assert group.kv_cache_spec.block_size % 64 == 0
    sizes = {name: spec.state_content_size_bytes for name, spec in group.kv_cache_spec.kv_cache_specs.items()}
    assert sorted(sizes.values()) == [136, 136, 512, 512]


@pytest.mark.parametrize("dtype", ["tq4", "auto"])
def test_the_backend_may_be_named_too(tmp_path, hopper, dtype):
    config = vllm_config(tmp_path, cache={"cache_dtype": dtype}, model={})
    config.attention_config.backend = AttentionBackendEnum["TQ"]
    model = ModelOnCpu(config)
    names = {layer.get_attn_backend().get_name() for layer in model.layers.values()}
    assert names == {"TQ" if dtype == "tq4" else "FLASH_ATTN"}


def test_another_backend_that_is_named_is_left_to_say_what_it_does_not_serve(tmp_path, hopper):
    config = vllm_config(tmp_path, cache={"cache_dtype": "tq4"}, model={})
    config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
    with pytest.raises(Exception, match=r"."):
        ModelOnCpu(config).allocate()
    assert hopper.asked == [(AttentionBackendEnum.FLASH_ATTN, "tq4")]


def test_the_registered_class_is_a_door_to_that_of_dtype_and_page(tmp_path):
    door = AttentionBackendEnum["TQ"].get_class()
    for block_size, page_tokens in ((None, 64), (64, 64), (128, 128), (192, 64)):
        cache = {"cache_dtype": "k3v2"} | ({"block_size": block_size} if block_size else {})
        with set_current_vllm_config(vllm_config(tmp_path, cache=cache, model={})):
            assert door.full_cls_name()[1] == f"TQAttentionBackend_k3v2_{page_tokens}"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
        ({"head_size": 72}, "head_dim must be a positive multiple of 16, not 72"),
        ({"head_size": 112}, "head_dim 112 cannot be rotated"),
        ({"block_size": 32}, "pages are of 64 or 128 tokens, --block-size 32 is no multiple of 64"),
        ({"head_size": 512}, "heads have 32 to 256 channels, not 512"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
)
def test_what_is_not_served_is_refused_in_words(tmp_path, hopper, changed, words):
    asked = vllm_selector.AttentionSelectorConfig(
        head_size=64, dtype=torch.bfloat16, kv_cache_dtype="tq4", block_size=None
    )
    choose = current_platform.get_attn_backend_cls
    with set_current_vllm_config(vllm_config(tmp_path, cache={"cache_dtype": "tq4"}, model={})):
        assert choose(None, attn_selector_config=asked, num_heads=None).endswith("_tq4_64")
        with pytest.raises(ValueError, match="--kv-cache-dtype tq4 does not serve this model") as raised:
            choose(None, attn_selector_config=asked._replace(**changed), num_heads=None)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"alibi_slopes": [1.0] * 4}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "other"}, "layers that read the cache of another"),
    ],
)
def test_layers_that_are_not_served_are_refused_when_they_are_made(make_model, layer, words):
    with pytest.raises(ValueError, match=words):
        make_model(layer=layer)


def test_heads_that_are_too_many_for_a_kv_head_are_refused(make_model):
    model = {"num_attention_heads": 34, "num_key_value_heads": 2, "hidden_size": 34 * 32}
    with pytest.raises(ValueError, match="34 query heads over 2 KV heads"):
        make_model(model=model)


def test_more_drafts_than_rows_are_refused(make_model, speculative):
    with pytest.raises(ValueError, match="16 drafts at once are too many"):
        make_model(**speculative(16))


def test_keys_and_values_of_different_sizes_are_refused(make_model):
    model = make_model()
    (layer, *_) = model.layers.values()
    spec = replace(model.groups[0][0].kv_cache_spec, head_size_v=16, state_content_bytes=None)
    with pytest.raises(ValueError, match="one size, not 32 and 16"):
        layer.get_attn_backend().customize_spec(spec)


def test_attention_that_looks_ahead_is_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="causal"):
        model.builder.build(0, SimpleNamespace(causal=False))


def test_microbatches_are_refused(tmp_path):
    config = vllm_config(tmp_path, cache={"cache_dtype": "tq4"}, model={})
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="microbatches"):
        ModelOnCpu(config).allocate()


def test_graphs_of_decodes_are_promised(make_model):
    model = make_model()
    assert model.graph_support.min_cg_support.name == "UNIFORM_BATCH"
