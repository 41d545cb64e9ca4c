"""Attention on compressed pages inside real transformers models, against plain attention."""

import pytest
import torch
from connectors.tiny_models import tiny_model, tokens
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


def test_padding_is_refused_with_a_sentence():
    model = tiny_model()
    connect(model, "tq4")
    batch = torch.tensor([tokens(10), tokens(10, seed=1)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="one sequence at a time"):
        model(input_ids=batch, attention_mask=mask)


def test_a_batch_is_refused_with_a_sentence():
    model = tiny_model()
    connector = connect(model, "tq4")
    with pytest.raises(ValueError, match="not a batch of 2"):
        model(input_ids=torch.tensor([tokens(10)] * 2), past_key_values=connector.open_cache(tokens(10)))


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


def test_a_training_pass_with_dropout_is_refused():
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    connector = connect(model.train(), "tq4")
    with pytest.raises(ValueError, match="dropout"):
        model(input_ids=torch.tensor([tokens(10)]), past_key_values=connector.open_cache(tokens(10)))
