"""Prompts through FlashAttention, in whose place stands what it is meant to compute."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils

from tq_connectors.vllm.flash import flash_prefill


@pytest.fixture
def calls(monkeypatch):
    """What FlashAttention was called with; it computes each sequence by itself."""
    seen = []

    def varlen(*, q, k, v, cu_seqlens_q, cu_seqlens_k, window_size, softmax_scale, causal, **more):
        seen.append({"window_size": window_size, "causal": causal, **more})
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        out = more.get("out", torch.empty_like(q))
        lse = torch.zeros(q.shape[1], len(q))
        starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        (first, first_key), *ends = starts
        for last, last_key in ends:
            num_new, num_keys = last - first, last_key - first_key  # the last of both are at one place
            distance = torch.arange(num_keys - num_new, num_keys)[:, None] - torch.arange(num_keys)
            mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
            sides = (q[first:last], k[first_key:last_key], v[first_key:last_key])
            out[first:last] = torch.nn.functional.scaled_dot_product_attention(
                *(side.float().transpose(0, 1) for side in sides),
                attn_mask=mask if causal else None,
                scale=softmax_scale,
                enable_gqa=True,
            ).transpose(0, 1)
            first, first_key = last, last_key
        return (out, lse) if more.get("return_softmax_lse") else out

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", varlen, raising=False)
    return seen


@pytest.mark.parametrize("window", [None, 48])
def test_a_long_chunk_is_attended_to_beside_its_prefix_made_dense(make_model, calls, window):
    model = make_model(windows=(window,), model={"sliding_window": 48})
    story = model.story(1, [1, 2, 3, 4, 5, 6])
    model.step([(story, 70)])
    ((out,),) = model.step([(story, 300)])
    assert [(call["causal"], call.get("return_softmax_lse", False)) for call in calls] == [
        (True, False),
        (True, True),
    ]
    want = story.exact(0, 300, window)
    assert float((out.float() - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize(("window", "window_size"), [(None, [-1, -1]), (48, [47, 0])])
def test_cold_prompts_go_to_it_together_and_come_out_as_without_it(make_model, calls, window, window_size):
    model = make_model(windows=(window,), model={"sliding_window": 48})
    stories = [model.story(1, [1, 2]), model.story(2, [3]), model.story(3, [4, 5])]
    outputs = model.step([(story, count) for story, count in zip(stories, (70, 12, 90), strict=True)])
    assert len(calls) == 1
    assert calls[0]["window_size"] == window_size
    assert (calls[0]["max_seqlen_q"], calls[0]["softcap"], calls[0]["fa_version"]) == (90, 0.0, 3)
    for story, (out,) in zip(stories, outputs, strict=True):
        want = story.exact(0, len(out), window)
        assert float((out.float() - want).norm() / want.norm()) < 0.01


def test_one_sequence_over_a_dense_prefix_comes_with_its_log_sum_exp(calls):
    attend = flash_prefill(32, softmax_scale=0.2, sliding_window=None, softcap=None)
    sides = [torch.randn(count, heads, 32) for count, heads in ((5, 4), (9, 2), (9, 2))]
    out, lse = attend.dense(*sides, causal=False)
    assert out.shape == (5, 4, 32)
    assert lse.shape == (4, 5)
    assert calls[0]["return_softmax_lse"]


def test_without_it_there_is_none(monkeypatch, calls):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: None)
    assert flash_prefill(32, softmax_scale=0.2, sliding_window=None, softcap=None) is None


def test_what_it_is_asked_for_outside_of_a_step_is_nothing(make_model):
    model = make_model()
    (layer, *_) = model.layers.values()
    sides = [torch.ones(3, heads, 32) for heads in (4, 2, 2)]
    out = layer.impl.forward(layer, *sides, layer.kv_cache, None, torch.ones(3, 4, 32))
    assert not out.any()
    with pytest.raises(NotImplementedError, match="quantize its output"):
        layer.impl.forward(layer, *sides, layer.kv_cache, SimpleNamespace(), out, output_scale=torch.ones(1))
