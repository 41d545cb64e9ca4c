"""Attention on compressed pages inside real transformers models, against plain attention."""

import pytest
import torch
from connectors.tiny_models import VOCABULARY, tiny_model, tokens
from transformers import DynamicCache

from tq_connectors.hf.connector import MODEL_TYPES, TQConnector
from tq_kernels import PRESETS, preset


def plain_logits(model, token_ids):
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids])).logits[0]


def connect(model, preset_name, page_tokens=32):
    return TQConnector(
        model, None, preset(preset_name), model_name="tiny", revision="1", page_tokens=page_tokens
    )


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_raw_pages_give_the_logits_of_plain_attention(model_type):
    model, token_ids = tiny_model(model_type), tokens(200)
    expected = plain_logits(model, token_ids)
    connector = connect(model, "raw")
    cache = connector.open_cache(token_ids)
    logits = connector.prefill(token_ids, cache, chunk_tokens=48)
    assert (cache.num_pages, cache.get_seq_length()) == (6, 200)
    assert relative(logits, expected) < 2e-2  # bfloat16 pages under float32 weights


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (4, 1, 64), (6, 2, 80), (2, 1, 96)])
def test_every_grouping_of_heads_and_odd_head_sizes(heads, kv_heads, head_dim):
    model, token_ids = tiny_model(heads=heads, kv_heads=kv_heads, head_dim=head_dim), tokens(100)
    expected = plain_logits(model, token_ids)
    connector = connect(model, "tq4", page_tokens=16)
    logits = connector.prefill(token_ids, connector.open_cache(token_ids), chunk_tokens=16)
    assert relative(logits, expected) < 0.3
    raw = connect(model, "raw", page_tokens=16)
    assert relative(raw.prefill(token_ids, raw.open_cache(token_ids), chunk_tokens=16), expected) < 2e-2


def test_fewer_bits_cost_more():
    model, token_ids = tiny_model(), tokens(200)
    expected = plain_logits(model, token_ids)
    errors = {}
    for name in PRESETS:
        connector = connect(model, name)
        logits = connector.prefill(token_ids, connector.open_cache(token_ids), chunk_tokens=32)
        errors[name] = relative(logits, expected)
    assert errors["raw"] < errors["fp8"] < errors["tq4"] < errors["tq3"] < errors["tq2"]
    assert errors["k8v4"] < errors["tq4"] < errors["k4v3"] < errors["k4v2"] < errors["tq2"]
    assert errors["raw"] > 0  # pages were read, not the raw tokens


def test_prefill_in_one_pass_or_token_by_token_ends_with_the_same_pages():
    model, token_ids = tiny_model(layers=1), tokens(70)
    caches = []
    for chunk in (70, 1):
        connector = connect(model, "tq4")
        caches.append(connector.open_cache(token_ids))
        connector.prefill(token_ids, caches[-1], chunk_tokens=chunk)
    # one layer: keys and values depend on tokens alone, so only rounding can differ
    first, second = (torch.cat([cache.page(i) for i in range(2)]) for cache in caches)
    assert (first != second).float().mean() < 0.01


def test_generate_of_transformers_works_on_pages():
    model, token_ids = tiny_model(), tokens(150)
    prompt = torch.tensor([token_ids])
    expected = model.generate(prompt, max_new_tokens=40, do_sample=False)
    connector = connect(model, "raw")
    cache = connector.open_cache(token_ids)
    got = model.generate(prompt, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert cache.num_pages == 5  # 189 tokens, some of them generated
    agreement = (got[0, 150:] == expected[0, 150:]).float().mean()
    assert agreement > 0.5
    assert got[0, 150] == expected[0, 150]


def test_with_another_cache_the_model_attends_as_before():
    model, token_ids = tiny_model("mistral"), tokens(120)
    expected = plain_logits(model, token_ids)
    connect(model, "tq2")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(input_ids=torch.tensor([token_ids[:70]]), past_key_values=cache).logits[0]
        second = model(input_ids=torch.tensor([token_ids[70:]]), past_key_values=cache).logits[0]
    torch.testing.assert_close(torch.cat((first, second)), expected, rtol=1e-4, atol=1e-4)


def test_with_another_cache_a_padded_batch_is_served_as_before():
    model = tiny_model()
    batch = torch.tensor([tokens(10), tokens(10, seed=1)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with torch.inference_mode():
        expected = model(input_ids=batch, attention_mask=mask).logits
        connect(model, "tq4")
        got = model(input_ids=batch, attention_mask=mask, past_key_values=DynamicCache()).logits
    torch.testing.assert_close(got, expected)


def padded(count):
    mask = torch.ones(1, count, dtype=torch.int64)
    mask[0, :3] = 0
    return mask


def tree(count):
    mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
    mask[0, 0, 9, 8] = False
    return mask


def two_way(count):
    return torch.zeros(1, 1, count, count)


@pytest.mark.parametrize("mask", [padded, tree, two_way])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_mask_that_pages_do_not_serve_is_refused(model_type, mask):
    model = tiny_model(model_type, layers=1)
    cache = connect(model, "tq4").open_cache(tokens(60))
    with pytest.raises(ValueError, match="pass no padding or mask"):
        model(input_ids=torch.tensor([tokens(60)]), attention_mask=mask(60), past_key_values=cache)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_says_what_pages_do_anyway_is_taken(model_type, dtype):
    model, token_ids = tiny_model(model_type), tokens(90)
    expected = plain_logits(model, token_ids)
    connector = connect(model, "raw")
    cache = connector.open_cache(token_ids)
    distance = torch.arange(90)[:, None] - torch.arange(90)
    visible = (distance >= 0) & (distance < (50 if model_type == "mistral" else 99))
    mask = visible if dtype == torch.bool else torch.zeros(90, 90).masked_fill(~visible, -torch.inf)
    with torch.inference_mode():
        for rows in (slice(0, 70), slice(70, 90)):
            chunk = torch.tensor([token_ids[rows]])
            cut = mask[rows, : rows.stop][None, None]
            logits = model(input_ids=chunk, attention_mask=cut, past_key_values=cache).logits[0]
    assert relative(logits, expected[70:]) < 2e-2


def test_a_batch_is_refused_with_a_sentence_also_when_the_cache_is_not_empty():
    model = tiny_model()
    connector = connect(model, "tq4")
    cache = connector.open_cache(tokens(10))
    for _ in range(2):
        with pytest.raises(ValueError, match="not a batch of 2"):
            model(input_ids=torch.tensor([tokens(10)] * 2), past_key_values=cache)
        connector.prefill(tokens(10) * 2 if cache.get_seq_length() else tokens(10), cache)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_what_generate_cannot_do_on_pages_is_refused_with_a_sentence(options):
    model, token_ids = tiny_model(), tokens(20) * 3
    cache = connect(model, "tq4").open_cache(token_ids)
    with pytest.raises(ValueError, match="TQCache holds one sequence"):
        model.generate(torch.tensor([token_ids]), past_key_values=cache, max_new_tokens=8, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model, token_ids = tiny_model().to(dtype), tokens(100)
    expected = plain_logits(model, token_ids).float()
    connector = connect(model, "raw")
    cache = connector.open_cache(token_ids)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids[:70]]), past_key_values=cache).logits
        assert logits.dtype == dtype
    assert relative(connector.prefill(token_ids, cache), expected[70:]) < 3e-2


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_each_layer_of_a_mixed_model_keeps_its_own_window(model_type):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model(model_type, use_sliding_window=True, sliding_window=20, layer_types=types)
    token_ids = tokens(150)
    expected = plain_logits(model, token_ids)
    connector = connect(model, "raw")
    cache = connector.open_cache(token_ids)
    assert relative(connector.prefill(token_ids, cache, chunk_tokens=24), expected) < 2e-2


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 31, 32, 33])
def test_prompts_around_the_sinks_and_a_page(model_type, count):
    model, token_ids = tiny_model(model_type), tokens(count)
    expected = plain_logits(model, token_ids)
    connector = connect(model, "raw")
    for chunk_tokens in (1, 3, 32):
        logits = connector.prefill(token_ids, connector.open_cache(token_ids), chunk_tokens=chunk_tokens)
        assert relative(logits, expected) < 2e-2


def test_a_cache_filled_in_inference_mode_serves_outside_it():
    model, token_ids = tiny_model(head_dim=96), tokens(80)
    connector = connect(model, "tq4", page_tokens=16)
    caches = [connector.open_cache(token_ids) for _ in range(2)]
    for cache in caches:
        connector.prefill(token_ids, cache)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens(40)]), past_key_values=caches[0]).logits
    got = model(input_ids=torch.tensor([tokens(40)]), past_key_values=caches[1]).logits
    torch.testing.assert_close(got, expected)
    assert caches[1].num_pages == 7


def test_only_the_last_logits_are_computed_when_asked():
    model, token_ids = tiny_model(), tokens(70)
    connector = connect(model, "tq4")
    everything = connector.prefill(token_ids, connector.open_cache(token_ids), chunk_tokens=32)
    last = connector.prefill(token_ids, connector.open_cache(token_ids), chunk_tokens=32, last_only=True)
    assert everything.shape == (70, VOCABULARY)
    torch.testing.assert_close(last, everything[-1:])


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_attention_that_pages_do_not_serve_is_refused(option):
    model = tiny_model()
    connector = connect(model, "tq4")
    with pytest.raises(ValueError, match=option):
        model(
            input_ids=torch.tensor([tokens(10)]),
            past_key_values=connector.open_cache(tokens(10)),
            **{option: torch.ones(1)},
        )


def test_the_scale_of_the_model_is_used_on_pages_and_elsewhere():
    model, token_ids = tiny_model(), tokens(100)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.05
    expected = plain_logits(model, token_ids)
    connector = connect(model, "raw")
    with torch.inference_mode():
        elsewhere = model(input_ids=torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(elsewhere, expected)
    assert relative(connector.prefill(token_ids, connector.open_cache(token_ids)), expected) < 2e-2


def test_training_with_another_cache_has_its_dropout():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    connect(model.train(), "tq4")
    first, second = (model(input_ids=torch.tensor([tokens(10)])).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_a_training_pass_with_dropout_is_refused():
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    connector = connect(model.train(), "tq4")
    with pytest.raises(ValueError, match="dropout"):
        model(input_ids=torch.tensor([tokens(10)]), past_key_values=connector.open_cache(tokens(10)))
