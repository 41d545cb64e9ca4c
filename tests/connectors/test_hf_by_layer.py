"""Models whose layers have different presets: through a real store and back, and what a real one loses."""

from pathlib import Path

import pytest
import torch
from connectors.test_hf_connector import FULL_PAGES, PAGE, PROMPT, answer, close_to
from connectors.tiny_models import tiny_model
from store.running_server import running_server

from tq_connectors.hf.connector import TQConnector
from tq_store.block import HEADER_BYTES
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "documents" / "constitution.txt"
LAYERS = 5
TABLE = "tq3+tq4:1-2+raw:4"
RUNS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS)


def connect(model, client, codec=TABLE, **options):
    return TQConnector(model, client, codec, model_name="tiny", revision="1", page_tokens=PAGE, **options)


def test_every_full_page_that_one_replica_saved_the_next_one_loads(model):
    cold = answer(connect(model, None))[1]
    with running_server() as server, StoreClient(server.address) as client:
        saving = connect(model, client)
        assert answer(saving)[0] == 4  # the sinks it computed itself
        assert saving.prefix_cache.saves.saved_blocks == FULL_PAGES * RUNS
        loading = connect(model, client, "tq3+raw:4+tq4:2,1")
        hit, logits = answer(loading)
        assert hit == FULL_PAGES * PAGE
        assert close_to(logits, cold)
        counters = loading.prefix_cache.counters
        assert counters.loaded_bytes == FULL_PAGES * (RUNS * HEADER_BYTES + loading.layout.page_bytes)
        assert (counters.loaded_pages, counters.failed_pages) == (FULL_PAGES, 0)
        assert loading.state.digest == saving.state.digest


def test_another_table_misses_and_a_table_of_one_preset_is_that_preset(model):
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client))
        for other in ("tq3", "tq3+tq4:1-2", "tq3+tq4:1-2+fp8:4"):
            assert answer(connect(model, client, other))[0] == 4
        assert answer(connect(model, client, "tq4+tq3:0-4"))[0] == FULL_PAGES * PAGE


def test_layers_whose_keys_are_not_rotated_are_kept_as_they_are(model):
    pages = []
    for codec, is_balanced in (("raw", False), ("raw+tq4:4", True)):
        with connect(model, None, codec) as connector:
            cache = connector.open_cache(PROMPT)
            connector.prefill(PROMPT, cache)
        assert connector.is_balanced == (cache.key_balance is not None) == is_balanced
        num_bytes = connector.layout.by_layer[0].page_bytes * (LAYERS - 1)
        pages.append([cache.page(index)[:num_bytes] for index in range(FULL_PAGES)])
    for raw, mixed in zip(*pages, strict=True):
        assert torch.equal(raw, mixed)


@pytest.mark.parametrize(
    ("codec", "complaint"),
    [
        ("tq3+tq4:5", "names layer 5, and the model has 5 layers from 0 on"),
        ("tq3+tq4", "names no codec"),
        ("tq3+tq9:0", "tiny cannot be cached with this codec: unknown preset 'tq9'"),
    ],
)
def test_a_codec_that_there_is_not_is_told(model, codec, complaint):
    with pytest.raises(ConfigError, match=complaint):
        connect(model, None, codec)


def test_a_mixed_table_costs_smollm2_something_between_its_two_presets(smollm2):
    model, tokenizer = smollm2
    before = model.config._attn_implementation
    token_ids = tokenizer(DOCUMENT.read_text(encoding="utf-8"))["input_ids"][:192]
    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([token_ids])).logits[0, 64:].float().log_softmax(-1)

    def loss(codec):
        with TQConnector(model, None, codec, model_name="m", revision="1", balanced=False) as connector:
            cache = connector.open_cache(token_ids)
            logits = connector.prefill(token_ids, cache, chunk_tokens=64)[-len(reference) :].log_softmax(-1)
        return float((reference.exp() * (reference - logits)).sum(-1).mean()), connector.layout.page_bytes

    try:
        (fine, fine_bytes), (mixed, mixed_bytes), (coarse, coarse_bytes) = map(
            loss, ("tq4", "tq2+tq4:0-14", "tq2")
        )
    finally:
        model.set_attn_implementation(before)
    assert 0 < 1.5 * fine < mixed < coarse / 1.5
    assert 2 * mixed_bytes == fine_bytes + coarse_bytes
