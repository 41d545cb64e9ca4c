"""TQCache: pages are sealed once, announced once, and given pages stay untouched."""

import copy

import pytest
import torch
from connectors.tiny_models import tiny_model, tokens

from tq_connectors.hf.cache import TQCache
from tq_connectors.hf.connector import TQConnector
from tq_connectors.model_layout import ModelLayout
from tq_kernels import PageLayout, preset

LAYERS = 3
LAYOUT = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=2, page_tokens=16)
LAYOUTS = ModelLayout.of(LAYOUT, LAYERS)


@pytest.fixture
def model():
    model = tiny_model(layers=LAYERS)
    TQConnector(model, None, preset("tq4"), model_name="tiny", revision="1")
    return model


def run(model, cache, token_ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), past_key_values=cache).logits[0]


def page_bytes(cache, index):
    return cache.page(index).numpy().tobytes()


def test_pages_are_announced_once_in_order_when_all_layers_have_them(model):
    seen = []
    cache = TQCache(LAYOUTS, on_page=lambda cache: seen.append(cache.num_sound_pages))
    for count, expected in ((10, 0), (5, 0), (1, 1), (15, 1), (40, 4), (1, 4)):
        run(model, cache, tokens(count))
        assert cache.num_pages == cache.num_sound_pages == expected
    assert seen == [1, 4]
    for index in range(4):
        page = cache.page(index)
        assert page.shape == (LAYERS * LAYOUT.page_bytes,)
        assert page.view(LAYERS, -1).any(dim=1).all()


def test_preloaded_pages_stand_for_the_tokens_they_were_made_from(model):
    token_ids = tokens(100)
    cold = TQCache(LAYOUTS)
    run(model, cold, token_ids[:48])
    expected = run(model, cold, token_ids[48:])
    warm, seen = TQCache(LAYOUTS, on_page=lambda cache: seen.append(cache.num_sound_pages)), []
    run(model, warm, token_ids[:4])
    assert warm.preload(memoryview(page_bytes(cold, i)) for i in range(3)) == 3
    assert (warm.num_sound_pages, warm.get_seq_length()) == (3, 48)
    torch.testing.assert_close(run(model, warm, token_ids[48:]), expected)
    assert seen == [6]
    assert [page_bytes(warm, i) for i in range(3)] == [page_bytes(cold, i) for i in range(3)]


def test_a_cache_grows_past_its_first_capacity_without_changing_pages(model):
    cache, copies = TQCache(LAYOUTS), {}
    for _ in range(20):
        run(model, cache, tokens(16))
        copies[cache.num_pages - 1] = page_bytes(cache, cache.num_pages - 1)
    assert {i: page_bytes(cache, i) for i in range(20)} == copies


@pytest.mark.parametrize("count", [0, 3, 5])
def test_pages_are_only_taken_after_exactly_the_sinks(model, count):
    cache = TQCache(LAYOUTS)
    if count:
        run(model, cache, tokens(count))
    with pytest.raises(ValueError, match="first 4 tokens"):
        cache.preload([])


def test_without_a_page_the_computed_tokens_stay(model):
    token_ids = tokens(40)
    cold = TQCache(LAYOUTS)
    run(model, cold, token_ids[:4])
    expected = run(model, cold, token_ids[4:])
    cache = TQCache(LAYOUTS)
    run(model, cache, token_ids[:4])
    assert cache.preload([]) == 0
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(run(model, cache, token_ids[4:]), expected)


def test_lengths_are_what_transformers_needs(model):
    cache = TQCache(LAYOUTS)
    assert (cache.get_seq_length(), len(cache), cache.is_compileable) == (0, LAYERS, False)
    run(model, cache, tokens(37))
    assert (cache.get_seq_length(), cache.get_max_length()) == (37, -1)
    assert cache.get_mask_sizes(5, 0) == (42, 0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_pages_made_from_what_is_no_number_are_not_shared_nor_those_after_them(model, poison, side):
    seen = []
    cache = TQCache(LAYOUTS, on_page=lambda cache: seen.append(cache.num_sound_pages))
    run(model, cache, tokens(16))
    shape = (1, LAYOUT.num_kv_heads, 16, LAYOUT.head_dim)
    for poisons in ((1, poison, 1), (1, 1, 1)):
        for layer, number in zip(cache.layers, poisons, strict=True):
            sides = [torch.ones(shape), torch.ones(shape)]
            sides[side][0, 1, 3, 5] = number
            layer.update(*sides)
            layer.finish_pass()
    assert (cache.num_pages, cache.num_sound_pages) == (3, 1)
    assert seen == [1]


def test_a_long_prompt_leaves_nothing_of_it_raw_in_memory(model):
    cache = TQCache(LAYOUTS)
    run(model, cache, tokens(165))
    raw_bytes = {
        tensor.untyped_storage().nbytes() / (LAYOUT.num_kv_heads * LAYOUT.head_dim * 4)
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    }
    assert raw_bytes == {4, 5}  # tokens: sinks and tail


def test_each_layer_keeps_its_pages_on_its_own_device():
    cache = TQCache(LAYOUTS)
    first, second = cache.layers[:2]
    first.lazy_initialization(torch.empty(1, 2, 0, 32), torch.empty(1, 2, 0, 32))
    second.lazy_initialization(*[torch.empty(1, 2, 0, 32, device="meta")] * 2)
    assert [layer.slots(0, 1).device.type for layer in (first, second)] == ["cpu", "meta"]


def test_a_pool_grows_twofold_and_no_more(model):
    cache = TQCache(LAYOUTS)
    run(model, cache, tokens(16 * 9))
    run(model, cache, tokens(16 * 10))
    assert {len(layer._pool) for layer in cache.layers} == {19}
    run(model, cache, tokens(16))
    assert {len(layer._pool) for layer in cache.layers} == {38}


def test_after_a_pass_that_failed_midway_the_cache_refuses_to_go_on(model, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    seen = []
    cache = TQCache(LAYOUTS, on_page=lambda cache: seen.append(cache.num_sound_pages))
    run(model, cache, tokens(16))
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].self_attn, "forward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, cache, tokens(16))
    with pytest.raises(ValueError, match="open another cache"):
        run(model, cache, tokens(16))
    assert seen == [1]


def test_a_model_that_attends_in_another_way_is_noticed(model):
    cache = TQCache(LAYOUTS)
    run(model, cache, tokens(20))
    model.set_attn_implementation("sdpa")
    run(model, cache, tokens(1))
    with pytest.raises(ValueError, match='not with attn_implementation="tq"'):
        run(model, cache, tokens(1))


def test_a_copied_cache_goes_its_own_way(model):
    first = TQCache(LAYOUTS)
    run(model, first, tokens(40))
    second = copy.deepcopy(first)
    one, other = run(model, first, tokens(30, seed=1)), run(model, second, tokens(30, seed=2))
    assert not torch.equal(one, other)
    assert not torch.equal(first.page(3), second.page(3))
    assert torch.equal(first.page(1), second.page(1))


@pytest.mark.parametrize("name", ["crop", "reset", "reorder_cache", "batch_repeat_interleave"])
def test_what_would_change_sealed_pages_is_refused_with_a_sentence(model, name):
    cache = TQCache(LAYOUTS)
    run(model, cache, tokens(20))
    with pytest.raises(ValueError, match="open another cache"):
        getattr(cache, name)(*([] if name == "reset" else [1]))
