"""The backend with vLLM's own configuration, specs, pools and metadata, against exact attention."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from tq_connectors.vllm import metadata

LOSSY = {"tq4": 0.2, "tq3": 0.4, "k8v4": 0.15, "k3v2": 0.7}
"""Relative error of attention over compressed made-up vectors, at most; a wrong prefix makes it above 1."""
RAW = 0.01


def errors(model, outputs, story, count):
    """Relative error of a story's outputs in every layer."""
    found = []
    for number, (out, layer) in enumerate(zip(outputs, model.layers.values(), strict=True)):
        want = story.exact(number, count, layer.sliding_window)
        found.append(float((out.float() - want).norm() / want.norm()))
    return found


@pytest.mark.parametrize("dtype", LOSSY)
def test_a_prompt_is_raw_and_what_follows_reads_pages(make_model, dtype):
    model = make_model(dtype)
    story = model.story(1, [1, 2, 3, 4])
    (cold,) = model.step([(story, 127)])
    assert max(errors(model, cold, story, 127)) < RAW
    for _ in range(3):  # over the edge of a page
        (decoded,) = model.step([(story, 1)])
        assert max(errors(model, decoded, story, 1)) < LOSSY[dtype]


def test_a_batch_of_decodes_hits_chunks_and_cold_prompts_is_right_in_every_row(make_model):
    model = make_model()
    old, other = model.story(1, [1, 2, 3, 4]), model.story(2, [5, 6, 7])
    model.step([(old, 150), (other, 70)])
    hit = model.story(3, [1, 2, 8, 9], shared=old, prefix_len=128)
    short, long = model.story(4, [10]), model.story(5, [11, 12, 13, 14, 15])
    batch = [(old, 1), (other, 33), (short, 9), (hit, 40), (long, 300)]
    outputs = model.step(batch)
    for (story, count), out in zip(batch, outputs, strict=True):
        bound = RAW if story in (short, long) else LOSSY["tq4"]
        assert max(errors(model, out, story, count)) < bound
    # the hit is compared with what ignoring its prefix would have given
    alone = torch.nn.functional.scaled_dot_product_attention(
        *(hit.new(0, 40, side).float().transpose(0, 1) for side in range(3)), is_causal=True, enable_gqa=True
    )
    want = hit.exact(0, 40).transpose(0, 1)
    assert float((alone - want).norm() / want.norm()) > 1.0


@pytest.mark.parametrize("chunk", [64, 50])
def test_chunks_of_a_prompt_come_to_what_it_is_at_once(make_model, chunk):
    model = make_model()
    whole, cut = model.story(1, [1, 2, 3]), model.story(1, [4, 5, 6])
    (at_once,) = model.step([(whole, 130)])
    outputs = []
    while cut.length < 130:
        (out,) = model.step([(cut, min(chunk, 130 - cut.length))])
        outputs.append(out[0])
    exact = at_once[0].float()
    assert float((torch.cat(outputs).float() - exact).norm() / exact.norm()) < LOSSY["tq4"]
    # both go on alike
    after = [model.step([(story, 1)])[0] for story in (whole, cut)]
    assert max(errors(model, after[0], whole, 1)) < LOSSY["tq4"]
    assert max(errors(model, after[1], cut, 1)) < LOSSY["tq4"]


@pytest.mark.parametrize("rows", [[4, 4, 4], [4, 1, 3], [1, 4, 4]])
def test_drafts_are_verified_in_one_step_and_forgotten_if_refused(make_model, speculative, rows):
    model = make_model(**speculative(3))
    assert model.builder.reorder_batch_threshold == 4
    stories = [model.story(seed, [3 * seed + 1, 3 * seed + 2, 3 * seed + 3]) for seed in range(3)]
    model.step([(story, 61 + seed) for seed, story in enumerate(stories)])  # drafts cross the edge of a page
    for _ in range(2):
        batch = list(zip(stories, rows, strict=True))
        for (story, count), out in zip(batch, model.step(batch), strict=True):
            assert max(errors(model, out, story, count)) < LOSSY["tq4"]
            story.length -= count - 1


def test_sequences_of_nobody_change_nothing(make_model, speculative):
    model = make_model(**speculative(1))
    stories = [model.story(1, [1, 2]), model.story(2, [3, 4])]
    model.step([(story, 70) for story in stories])
    before = {name: pages.clone() for name, pages in model.pages.items()}
    batch = [(story, 2) for story in stories]
    for (story, count), out in zip(batch, model.step(batch, padded_seqs=2, rows=2), strict=True):
        assert max(errors(model, out, story, count)) < LOSSY["tq4"]
    for name, pages in model.pages.items():
        changed = (pages != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == [2, 4]


@pytest.mark.parametrize("is_hybrid", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_layers_with_a_window_see_it_alone(make_model, monkeypatch, softcap, is_hybrid):
    # with vLLM's hybrid manager, windowed layers have blocks of their own and give the oldest ones back
    monkeypatch.setattr(current_platform, "support_hybrid_kv_cache", lambda: is_hybrid)
    model = make_model(windows=(None, 48), layer={"logits_soft_cap": softcap}, model={"sliding_window": 48})
    assert len(model.groups) == 1 + is_hybrid
    story = model.story(1, [1, 2, 3, 4])
    for count, bound in ((150, RAW), (1, LOSSY["tq4"]), (20, LOSSY["tq4"]), (70, LOSSY["tq4"])):
        (out,) = model.step([(story, count)])
        if softcap is None:
            assert max(errors(model, out, story, count)) < bound
        else:
            assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_a_page_is_one_run_of_bytes_in_every_layout_taken(make_model, monkeypatch, layout):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    model = make_model()
    assert model.config.cache_config.kv_cache_layout == layout
    story, other = model.story(1, [1, 2]), model.story(2, [3, 4])
    model.step([(story, 100), (other, 100)])
    (out, _) = model.step([(story, 1), (other, 1)])
    assert max(errors(model, out, story, 1)) < LOSSY["tq4"]


def test_blocks_of_128_tokens_are_pages_and_larger_ones_are_several(make_model):
    for block_size, page_tokens in ((64, 64), (128, 128), (256, 128), (192, 64)):
        model = make_model(cache={"block_size": block_size})
        assert model.page_tokens == page_tokens
        story = model.story(1, [1, 2, 3, 4])
        model.step([(story, page_tokens + 5)])
        (out,) = model.step([(story, 1)])
        assert max(errors(model, out, story, 1)) < LOSSY["tq4"]


@pytest.mark.parametrize(
    ("connector", "keeps"),
    [(None, True), ("TQStoreConnector", True), ("OffloadingConnector", True), ("LMCacheConnectorV1", False)],
)
def test_first_tokens_are_kept_where_pages_are_whole_when_a_step_is_prepared(connector, keeps):
    transfer = None if connector is None else SimpleNamespace(kv_connector=connector)
    assert metadata._keeps_sinks(SimpleNamespace(kv_transfer_config=transfer)) is keeps
