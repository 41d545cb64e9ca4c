"""Two models share prefixes through a real server, and a bad server costs misses, never an answer."""

import copy
import logging
import socket
import threading

import pytest
import torch
from connectors.tiny_models import tiny_model, tokens
from store.running_server import foreign_server, running_server
from transformers import GPT2Config, LlamaConfig

from tq_connectors.codec import CacheGeometry, pack_pages
from tq_connectors.hf.connector import TQConnector, cache_geometry
from tq_kernels import PRESETS, PageLayout, preset
from tq_store.block import HEADER_BYTES
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcUnavailable
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

PAGE = 16
PROMPT = tokens(100)
FULL_PAGES = 6
IMPATIENT = ClientConfig(connect_timeout_s=0.2, lookup_timeout_s=0.3, transfer_timeout_s=0.3, max_attempts=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def connect(model, client, preset_name="tq4", **options):
    options = {"model_name": "tiny", "revision": "1", "page_tokens": PAGE} | options
    return TQConnector(model, client, preset(preset_name), **options)


def answer(connector, prompt=PROMPT):
    """Tokens that came from the store, and the logits of the last prompt token."""
    with connector:
        cache = connector.open_cache(prompt)
        hit = cache.get_seq_length()
        logits = connector.prefill(prompt, cache, chunk_tokens=32)
        assert cache.get_seq_length() == len(prompt)
    return hit, logits[-1]


def close_to(logits, expected, tolerance=1e-3):
    return float((logits - expected).norm() / expected.norm()) < tolerance


@pytest.fixture(scope="module")
def expected(model):
    """Logits without a store."""
    return answer(connect(model, None))[1]


@pytest.fixture(scope="module")
def stateless(model):
    """Logits without a store and without a codec state."""
    return answer(connect(model, None, balanced=False))[1]


@pytest.mark.parametrize("preset_name", PRESETS)
def test_every_full_page_that_one_replica_saved_the_next_one_loads(model, preset_name):
    cold = answer(connect(model, None, preset_name))[1]
    with running_server() as server, StoreClient(server.address) as client:
        assert answer(connect(model, client, preset_name))[0] == 4  # the sinks it computed itself
        connector = connect(model, client, preset_name)
        hit, logits = answer(connector)
        assert hit == FULL_PAGES * PAGE
        assert close_to(logits, cold)
        counters = connector.prefix_cache.counters
        assert counters.loaded_bytes == FULL_PAGES * (HEADER_BYTES + connector.layout.page_bytes)
        assert (counters.loaded_pages, counters.failed_pages) == (FULL_PAGES, 0)


def test_the_last_token_is_computed_even_when_all_pages_are_stored(model):
    prompt = PROMPT[: FULL_PAGES * PAGE]
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client), prompt)
        assert answer(connect(model, client), prompt)[0] == (FULL_PAGES - 1) * PAGE


def test_a_prompt_without_a_reusable_page_asks_for_the_state_alone(model):
    with StoreClient("127.0.0.1:9", config=IMPATIENT) as client:
        assert answer(connect(model, client), PROMPT[:PAGE])[0] == 0
        assert client.counters["failed_calls"] == 2  # the state, and the save of its one page


def test_another_question_about_the_same_document_hits_the_document(model):
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client))
        other = PROMPT[:70] + tokens(50, seed=9)
        assert answer(connect(model, client), other)[0] == 4 * PAGE


@pytest.mark.parametrize(
    "options", [{"model_name": "other"}, {"revision": "2"}, {"salt": "tenant"}, {"page_tokens": 32}]
)
def test_what_makes_caches_incompatible_makes_misses(model, options):
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client))
        assert answer(connect(model, client, **options))[0] == 4
        assert answer(connect(model, client, "tq3"))[0] == 4


def test_generated_pages_can_be_saved_for_the_next_turn(model):
    with running_server() as server, StoreClient(server.address) as client:
        with connect(model, client) as connector:
            cache = connector.open_cache(PROMPT)
            turn = model.generate(
                torch.tensor([PROMPT]), past_key_values=cache, max_new_tokens=40, do_sample=False
            )[0].tolist()
            connector.save_generated(cache, turn[:-1])
        assert answer(connect(model, client), turn + tokens(10))[0] == 139 // PAGE * PAGE


def blocks_saved(connector):
    """Blocks that the store has taken."""
    assert connector.prefix_cache.saves.flush(30)
    return connector.prefix_cache.saves.saved_blocks


def test_each_page_is_saved_once_over_several_turns(model):
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client))
        with connect(model, client) as connector:
            cache = connector.open_cache(PROMPT)
            turn = model.generate(
                torch.tensor([PROMPT]), past_key_values=cache, max_new_tokens=40, do_sample=False
            )[0].tolist()
            assert blocks_saved(connector) == 0  # all of the prompt came from the store
            connector.save_generated(cache, turn[:-1])
            connector.save_generated(cache, turn[:-1])
            assert blocks_saved(connector) == 139 // PAGE - FULL_PAGES
            connector.prefill(turn + tokens(60), cache)
            assert blocks_saved(connector) == 200 // PAGE - FULL_PAGES
        hit, logits = answer(connect(model, client), turn + tokens(60) + [1])
        assert hit == 200 // PAGE * PAGE
        assert close_to(logits, answer(connect(model, None), turn + tokens(60) + [1])[1], 0.3)


def test_pages_generated_from_what_is_no_number_are_not_saved():
    model = tiny_model()
    with (
        running_server() as server,
        StoreClient(server.address) as client,
        connect(model, client) as connector,
    ):
        cache = connector.open_cache(PROMPT)
        connector.prefill(PROMPT, cache)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[3] = torch.nan
            model(input_ids=torch.tensor([tokens(40)]), past_key_values=cache)
        connector.save_generated(cache, PROMPT + tokens(40))
        assert cache.num_pages == 140 // PAGE
        assert blocks_saved(connector) == FULL_PAGES


def test_a_cache_of_another_prompt_is_refused_before_anything_wrong_is_saved(model):
    other = [*PROMPT[:98], 1, 2, *tokens(60)]
    with (
        running_server() as server,
        StoreClient(server.address) as client,
        connect(model, client) as connector,
    ):
        cache = connector.open_cache(PROMPT)
        for call in (connector.prefill, lambda ids, cache: connector.save_generated(cache, ids)):
            with pytest.raises(ValueError, match="opened for other tokens"):
                call(other, cache)
        connector.prefill(PROMPT[:50], cache)
        connector.prefill(PROMPT, cache)
        assert blocks_saved(connector) == FULL_PAGES


def test_the_callers_list_of_tokens_may_grow(model):
    prompt = list(PROMPT)
    with (
        running_server() as server,
        StoreClient(server.address) as client,
        connect(model, client) as connector,
    ):
        cache = connector.open_cache(prompt)
        connector.prefill(prompt, cache)
        prompt += tokens(60)
        connector.prefill(prompt, cache)
        assert blocks_saved(connector) == 160 // PAGE


def test_a_copied_cache_saves_what_it_computes_itself(model):
    with (
        running_server() as server,
        StoreClient(server.address) as client,
        connect(model, client) as connector,
    ):
        cache = connector.open_cache(PROMPT)
        connector.prefill(PROMPT, cache)
        for seed in (1, 2):
            connector.prefill(PROMPT + tokens(60, seed), copy.deepcopy(cache))
        assert blocks_saved(connector) == FULL_PAGES + 2 * (160 // PAGE - FULL_PAGES)
        for seed in (1, 2):
            assert answer(connect(model, client), PROMPT + tokens(60, seed) + [1])[0] == 160


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"sliding_window": 30},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_a_setting_changed_after_loading_makes_misses(change):
    with running_server() as server, StoreClient(server.address) as client:
        assert answer(connect(tiny_model("mistral"), client))[0] == 4
        assert answer(connect(tiny_model("mistral", **change), client))[0] == 4
        elsewhere = tiny_model("mistral", name_or_path="/other/place")
        assert answer(connect(elsewhere, client))[0] == FULL_PAGES * PAGE


def test_another_dtype_makes_misses(model):
    with running_server() as server, StoreClient(server.address) as client:
        answer(connect(model, client))
        assert answer(connect(tiny_model().to(torch.bfloat16), client))[0] == 4


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_keys_that_depend_on_what_follows_them_are_refused(rope_type):
    config = LlamaConfig()
    config.rope_parameters["rope_type"] = rope_type
    with pytest.raises(ConfigError, match=f"rope_type '{rope_type}' is not served"):
        cache_geometry(config, torch.float32)


def test_pages_too_large_for_a_block_are_refused_before_any_work(model):
    with (
        StoreClient("127.0.0.1:9", config=IMPATIENT) as client,
        pytest.raises(ConfigError, match="use smaller pages"),
    ):
        connect(model, client, "raw", page_tokens=1 << 19)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({}, "holds 100 tokens, of 100 nothing is left"), ({"chunk_tokens": 0}, "at least 1, not 0")],
)
def test_a_prefill_that_means_nothing_is_refused(model, options, sentence):
    connector = connect(model, None)
    cache = connector.open_cache(PROMPT)
    connector.prefill(PROMPT, cache)
    with pytest.raises(ValueError, match=sentence):
        connector.prefill(PROMPT, cache, **options)


def test_a_reader_that_stops_early_is_no_failure(model):
    with running_server() as server, StoreClient(server.address) as client:
        first = connect(model, client)
        answer(first)
        with connect(model, client) as connector:
            connector.use_state(first.state)
            pages = connector.prefix_cache.load(connector.prefix_cache.keys(PROMPT))
            next(pages)
            pages.close()
            counters = connector.prefix_cache.counters
            assert (counters.loaded_pages, counters.failed_pages) == (1, 0)


def test_progress_is_told_after_each_chunk_which_ends_at_a_multiple(model):
    connector, seen = connect(model, None), []
    cache = connector.open_cache(PROMPT)
    connector.prefill(PROMPT[:10], cache)
    connector.prefill(PROMPT, cache, chunk_tokens=32, on_chunk=seen.append)
    assert seen == [32, 64, 96, 100]


def test_two_replicas_at_once_end_with_one_copy_of_each_page(model):
    with running_server() as server:

        def replica():
            with StoreClient(server.address) as client:
                answer(connect(tiny_model(), client))

        threads = [threading.Thread(target=replica) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with StoreClient(server.address) as client:
            assert client.stats().tiers["memory"].num_blocks == FULL_PAGES + 1  # the codec state
            assert answer(connect(model, client))[0] == FULL_PAGES * PAGE


def test_a_store_too_small_for_a_page_changes_nothing(model, expected):
    with running_server(memory_budget_bytes=1000) as server, StoreClient(server.address) as client:
        connector = connect(model, client)
        hit, logits = answer(connector)
        assert hit == 4
        assert close_to(logits, expected)
        assert connector.prefix_cache.saves.failed_blocks == FULL_PAGES
        assert answer(connect(model, client))[0] == 4


def test_a_dead_store_changes_nothing_and_is_logged_once(model, stateless, caplog):
    with caplog.at_level(logging.WARNING), StoreClient("127.0.0.1:9", config=IMPATIENT) as client:
        connector = connect(model, client)
        for _ in range(3):
            cache = connector.open_cache(PROMPT)
            assert close_to(connector.prefill(PROMPT, cache, chunk_tokens=32)[-1], stateless)
        connector.close()
        connector.close()
    loading = [record for record in caplog.records if "recomputed" in record.message]
    assert len(loading) == 1
    assert connector.prefix_cache.saves.saved_blocks == 0


def test_a_store_that_never_answers_costs_its_deadline_and_nothing_else(model, stateless):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with StoreClient(address, config=IMPATIENT) as client:
            hit, logits = answer(connect(model, client))
    assert hit == 4
    assert close_to(logits, stateless)


class LyingServicer(stubs.BlockStoreServicer):
    """Passes everything on to a real server, and spoils the answers from some block on."""

    def __init__(self, client, spoil, first_spoiled):
        self._client, self._spoil, self._first = client, spoil, first_spoiled

    def Lookup(self, request, context):
        return pb.LookupResponse(num_leading_hits=len(request.keys))

    def Get(self, request, context):
        blocks = dict(self._client.get(list(request.keys)))
        for index in range(len(request.keys)):
            data = self._spoil(blocks, index) if index >= self._first else blocks[index]
            yield pb.BlockFrame(index=index, offset=0, block_bytes=len(data), data=data)


def flipped(blocks, index):
    spoiled = bytearray(blocks[index])
    spoiled[len(spoiled) // 2] ^= 1
    return bytes(spoiled)


LIES = {
    "a flipped bit": flipped,
    "the block before it": lambda blocks, index: blocks[index - 1],
    "half a block": lambda blocks, index: blocks[index][: len(blocks[index]) // 2],
    "a byte too many": lambda blocks, index: blocks[index] + b"x",
    "noise": lambda blocks, index: b"\x00" * 999,
    "nothing": lambda blocks, index: b"",
}


@pytest.mark.parametrize("first_spoiled", [1, 3])
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_store_is_believed_up_to_its_first_lie(model, expected, lie, first_spoiled):
    with running_server() as server, StoreClient(server.address) as honest:
        answer(connect(model, honest))
        with (
            foreign_server(LyingServicer(honest, LIES[lie], first_spoiled)) as address,
            StoreClient(address) as client,
        ):
            connector = connect(model, client)
            hit, logits = answer(connector)
    assert hit == first_spoiled * PAGE
    assert close_to(logits, expected, 0.25)  # of the pages computed again, fewer are raw than in one pass
    assert connector.prefix_cache.counters.failed_pages == FULL_PAGES - first_spoiled


def test_pages_after_a_missing_one_are_not_taken(model, expected):
    class Forgetful(LyingServicer):
        def Get(self, request, context):
            for index, frame in enumerate(super().Get(request, context)):
                yield pb.BlockFrame(index=index) if index == 2 else frame

    with running_server() as server, StoreClient(server.address) as honest:
        answer(connect(model, honest))
        with (
            foreign_server(Forgetful(honest, flipped, 99)) as address,
            StoreClient(address) as client,
        ):
            connector = connect(model, client)
            hit, logits = answer(connector)
    assert hit == 2 * PAGE
    assert connector.prefix_cache.counters.failed_pages == FULL_PAGES - 2
    assert close_to(logits, expected, 0.25)


def test_a_sound_block_of_another_shape_under_the_key_is_a_miss(model, expected, caplog):
    with running_server() as server, StoreClient(server.address) as client:
        connector = connect(model, client)
        connector.use_state(connector.measure_state(PROMPT))
        key = connector.prefix_cache.keys(PROMPT)[0]
        other = PageLayout(spec=preset("tq3"), head_dim=32, num_kv_heads=2, page_tokens=PAGE)
        pages = bytes(connector.geometry.num_layers * other.page_bytes)
        client.put([(key, pack_pages(other, connector.geometry.num_layers, key, pages))])
        with caplog.at_level(logging.WARNING):
            hit, logits = answer(connector)
    assert hit == 4
    assert close_to(logits, expected)
    assert "another codec" in caplog.text


def test_each_outage_of_loading_is_logged_once(model, caplog):
    with running_server() as server, StoreClient(server.address) as client:
        connector = connect(model, client)
        answer(connector)
        keys = connector.prefix_cache.keys(PROMPT)
        with caplog.at_level(logging.WARNING):
            for outage in (1, 2):
                connector.prefix_cache._client = Broken()
                assert not any(list(connector.prefix_cache.load(keys)) for _ in range(3))
                connector.prefix_cache._client = client
                assert len(list(connector.prefix_cache.load(keys))) == FULL_PAGES
                assert len([r for r in caplog.records if "recomputed" in r.message]) == outage


class Broken:
    """A client whose server has gone."""

    def lookup(self, keys):
        raise RpcUnavailable("nobody listens")


def test_a_server_that_dies_in_the_middle_of_a_get_leaves_a_shorter_prefix(model, expected):
    class Dying(LyingServicer):
        def Get(self, request, context):
            yield from list(super().Get(request, context))[:2]
            raise RuntimeError("killed")

    with running_server() as server, StoreClient(server.address) as honest:
        answer(connect(model, honest))
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        with (
            foreign_server(Dying(honest, flipped, 99)) as address,
            StoreClient(address, config=IMPATIENT) as client,
        ):
            hit, logits = answer(connect(model, client))
    assert hit == 2 * PAGE
    assert close_to(logits, expected, 0.25)  # of the pages computed again, fewer are raw than in one pass


def test_head_size_is_what_the_config_says_or_what_follows_from_it():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert cache_geometry(LlamaConfig(**sizes, head_dim=32), torch.float32).head_dim == 32
    assert cache_geometry(LlamaConfig(**sizes), torch.bfloat16) == CacheGeometry(
        num_layers=32, num_kv_heads=2, head_dim=16, kv_dtype="bfloat16"
    )


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gpt2' is not served.*llama, mistral, qwen2, qwen3"):
        cache_geometry(GPT2Config(), torch.float32)


def test_a_head_size_that_cannot_be_rotated_is_refused_before_any_work():
    with pytest.raises(ConfigError, match="head_dim 112 cannot be rotated"):
        connect(tiny_model(head_dim=112, heads=2), None)
    answer(connect(tiny_model(head_dim=112, heads=2), None, "raw"))
