"""Pages through a real server: what is there comes back, and everything else is a miss."""

import dataclasses
import socket
import threading
import time

import pytest
import torch
from connectors.sglang.host_pool import HostMemory
from connectors.sglang.saved_pages import GEOMETRY, HASHES, PLACE, SETTINGS, page_at, pool_of, save
from store.running_server import running_server

from tq_connectors.codec import namespace_for
from tq_connectors.codec_state import CodecState, agree_on_state, pack_state
from tq_connectors.engine.state import STATE_VARIABLE
from tq_connectors.sglang.host_pages import read_host_pool
from tq_connectors.sglang.packed_pages import PackedCodec
from tq_connectors.sglang.page_setup import open_page_store
from tq_kernels import PageLayout, preset
from tq_store.block import HEADER_BYTES, pack_block
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcTimeout
from tq_store.rpc import shared_reader
from tq_store.rpc.connection import Pending
from tq_store.rpc.segment import Segment


@pytest.fixture(params=["shared memory", "a stream"])
def client(server, local_socket, request):
    """A connection to an empty server, by either road."""
    is_shared = request.param == "shared memory"
    with StoreClient(f"unix:{local_socket}" if is_shared else server.address) as connection:
        connection.purge(None)
        yield connection


@pytest.fixture
def near_client(server, local_socket):
    """A connection to an empty server, which shares memory."""
    with StoreClient(f"unix:{local_socket}") as connection:
        connection.purge(None)
        yield connection


def packed_pool(seed=None, heads=2, layout="page_first_direct"):
    """A pool of pages that are packed already, of two layers as of all that a pool does not look into."""
    row = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=2, page_tokens=16).slot_bytes
    pool = HostMemory(layout, num_pages=4, page_size=16, layers=1, heads=heads, dim=row, dtype=torch.uint8)
    if seed is not None:
        pool.kv_buffer.random_(256, generator=torch.Generator().manual_seed(seed))
    return read_host_pool(pool)


@pytest.mark.parametrize("staging_bytes", [1, 1 << 20])
@pytest.mark.parametrize("codec", ["none", "raw", "tq4"])
def test_another_replica_finds_the_pages(client, codec, staging_bytes):
    settings = dataclasses.replace(SETTINGS, codec=codec, staging_bytes=staging_bytes)
    saved, loaded = pool_of(seed=1), pool_of()
    save(client, saved, settings)
    store = open_page_store(client, settings, loaded.shape, PLACE)
    assert store.count_present(HASHES) == 4
    assert store.load(HASHES, page_at(loaded)) == [True] * 4
    difference = (saved.pool.kv_buffer.float() - loaded.pool.kv_buffer.float()).square().mean()
    assert difference < 0.012 if codec == "tq4" else difference == 0
    assert store.count_everything()["loaded_pages"] == 4


def test_pages_that_the_store_has_are_not_sent_again(client):
    saved = pool_of(seed=1)
    save(client, saved)
    again = save(client, saved)
    assert (again.counters.present_pages, again.counters.saved_pages) == (4, 0)


def test_a_load_ends_at_the_first_page_that_is_missing(client):
    saved, loaded = pool_of(seed=1), pool_of()
    store = save(client, saved)
    client.delete(store._names.keys(HASHES[2:3], store._names.saved_parts))
    assert store.count_present(HASHES) == 2
    assert store.load(HASHES, page_at(loaded)) == [True, True, False, False]
    assert torch.equal(loaded.page(16), saved.page(16))
    assert not loaded.page(32).any()
    assert (store.counters.loaded_pages, store.counters.failed_pages) == (2, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": dataclasses.replace(SETTINGS, revision="v2")},
        {"settings": dataclasses.replace(SETTINGS, codec="tq4")},
        {"settings": dataclasses.replace(SETTINGS, salt="tenant")},
        {"place": dataclasses.replace(PLACE, model="another")},
        {"place": dataclasses.replace(PLACE, geometry=dataclasses.replace(GEOMETRY, num_layers=4))},
        {"pages": pool_of(torch.float16)},
        {
            "pages": pool_of(dim=16),
            "place": dataclasses.replace(PLACE, geometry=dataclasses.replace(GEOMETRY, head_dim=16)),
        },
    ],
)
def test_what_makes_another_cache_is_no_hit(client, other):
    save(client, pool_of(seed=1))
    arguments = {"settings": SETTINGS, "place": PLACE, "pages": pool_of()} | other
    pages = arguments["pages"]
    store = open_page_store(client, arguments["settings"], pages.shape, arguments["place"])
    assert store.count_present(HASHES) == 0
    assert store.load(HASHES, page_at(pages)) == [False] * 4
    assert not pages.pool.kv_buffer.view(torch.uint8).any()


def test_a_sound_block_that_holds_something_else_is_a_miss(client, caplog):
    saved, loaded = pool_of(seed=1), pool_of()
    store = save(client, saved)
    (key,) = store._names.keys(HASHES[1:2], store._names.saved_parts)
    info = dataclasses.replace(store._codec.info(key, GEOMETRY.whole), rotation_seed=7)
    client.delete([key])
    client.put([(key, pack_block(info, bytes(info.payload_bytes)))])
    assert store.load(HASHES, page_at(loaded)) == [True, False, False, False]
    assert store.counters.rejected_blocks == 1
    assert "is a miss" in caplog.text


def test_what_the_store_does_not_take_is_counted():
    saved = pool_of(seed=1)
    with running_server(memory_budget_bytes=4096) as server, StoreClient(server.address) as client:
        store = open_page_store(client, SETTINGS, saved.shape, PLACE)
        assert store.save(HASHES, page_at(saved)) == [False] * 4
        assert (store.counters.saved_pages, store.counters.refused_pages) == (0, 4)
        assert store.guard.is_reachable


def test_a_purge_takes_the_pages_of_its_own_kind_alone(client):
    pages = pool_of(seed=1)
    store = save(client, pages)
    other = save(client, pages, dataclasses.replace(SETTINGS, salt="tenant"))
    assert store.purge()
    assert (store.count_present(HASHES), other.count_present(HASHES)) == (0, 4)


def test_no_pages_are_loaded_of_none(client):
    store = open_page_store(client, SETTINGS, pool_of().shape, PLACE)
    assert store.load([], page_at(pool_of())) == []
    assert store.count_present([]) == 0


def test_no_page_is_written_after_a_load_has_failed(client):
    """SGLang gives the memory of pages to others as soon as the call is over."""
    store = save(client, pool_of(seed=1))
    has_failed, written = threading.Event(), []

    def load_of(hashes, page_at):
        if hashes[0] == HASHES[0]:
            has_failed.set()
            raise ValueError("a codec's error")
        has_failed.wait(10)
        time.sleep(0.2)  # as a run that is under way takes
        written.extend(hashes)
        return [True] * len(hashes)

    store._load = load_of
    with pytest.raises(ValueError, match="a codec's error"):
        store.load(HASHES, page_at(pool_of()))
    assert sorted(written) == sorted(HASHES[1:])


def test_a_dead_store_is_a_miss_at_once(caplog):
    with socket.socket() as listener:  # bound, and nobody listens
        listener.bind(("127.0.0.1", 0))
        config = ClientConfig(address=f"127.0.0.1:{listener.getsockname()[1]}", lookup_timeout_s=0.3)
        with StoreClient(config=config) as client:
            pages = pool_of(seed=1)
            store = open_page_store(client, SETTINGS, pages.shape, PLACE)
            started = time.monotonic()
            for _ in range(50):
                assert store.count_present(HASHES) == 0
                assert store.load(HASHES, page_at(pages)) == [False] * 4
                assert store.save(HASHES, page_at(pages)) == [False] * 4
            assert time.monotonic() - started < 3
            assert not store.purge()
    store.close()
    assert store.count_everything()["skipped_calls"] > 140
    assert caplog.text.count("the store fails") == 1


@pytest.mark.parametrize("codec", ["none", "tq4"])
@pytest.mark.parametrize("saver", [1, 2])
def test_pages_are_found_by_replicas_of_another_tensor_parallel_size(client, codec, saver):
    """Saved by one process or by two, loaded by two or by one: the halves of the heads fit together."""
    settings = dataclasses.replace(SETTINGS, codec=codec, tp_sizes="1,2")
    sizes = {1: [pool_of(seed=1)], 2: [pool_of(heads=1, seed=2), pool_of(heads=1, seed=3)]}
    loaded = {1: [pool_of()], 2: [pool_of(heads=1), pool_of(heads=1)]}[3 - saver]
    for pools in (sizes[saver], loaded):
        places = [dataclasses.replace(PLACE, tp_rank=rank, tp_size=len(pools)) for rank in range(len(pools))]
        for pages, place in zip(pools, places, strict=True):
            store = open_page_store(client, settings, pages.shape, place)
            if pools is loaded:
                assert store.count_present(HASHES) == 4
                assert store.load(HASHES, page_at(pages)) == [True] * 4
            else:
                assert store.save(HASHES, page_at(pages)) == [True] * 4
    whole, halves = (loaded[0], sizes[saver]) if saver == 2 else (sizes[saver][0], loaded)
    joined = torch.cat([half.pool.kv_buffer for half in halves], dim=3).float()
    assert (joined - whole.pool.kv_buffer.float()).square().mean() < (0.012 if codec == "tq4" else 1e-12)


def test_replicas_of_other_sizes_that_were_not_named_miss_each_other(client):
    save(client, pool_of(seed=1))
    pages = pool_of(heads=1)
    store = open_page_store(client, SETTINGS, pages.shape, dataclasses.replace(PLACE, tp_size=2))
    assert store.count_present(HASHES) == 0


def test_of_processes_that_hold_the_same_heads_one_saves(client):
    pages = pool_of(heads=1, seed=1)
    stores = [
        open_page_store(client, SETTINGS, pages.shape, dataclasses.replace(PLACE, tp_rank=rank, tp_size=4))
        for rank in range(4)
    ]
    assert all(store.save(HASHES, page_at(pages)) == [True] * 4 for store in stores)
    assert [store.counters.saved_pages for store in stores] == [4, 0, 4, 0]
    assert all(store.count_present(HASHES) == 4 for store in stores)


def test_stages_of_a_pipeline_hold_layers_of_their_own(client):
    geometry = dataclasses.replace(GEOMETRY, num_layers=4)
    for first, seed in ((0, 1), (2, 2)):
        place = dataclasses.replace(PLACE, geometry=geometry, layers=range(first, first + 2))
        saved, loaded = pool_of(seed=seed), pool_of()
        save(client, saved, place=place)
        store = open_page_store(client, SETTINGS, loaded.shape, place)
        assert store.load(HASHES, page_at(loaded)) == [True] * 4
        assert torch.equal(loaded.pool.kv_buffer, saved.pool.kv_buffer)


def test_a_packed_pool_and_one_that_packs_on_the_way_share_pages(client):
    """An engine with `--kv-cache-dtype tq4`, and one that keeps its cache in bf16."""
    settings = dataclasses.replace(SETTINGS, codec="tq4")
    saved = pool_of(seed=1)
    save(client, saved, settings)
    row = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=2, page_tokens=16).slot_bytes
    packed = pool_of(torch.uint8, dim=row, layers=1)
    store = open_page_store(client, settings, packed.shape, PLACE)
    assert store.load(HASHES, page_at(packed)) == [True] * 4
    client.purge(None)
    assert store.save(HASHES, page_at(packed)) == [True] * 4
    loaded = pool_of()
    assert open_page_store(client, settings, loaded.shape, PLACE).load(HASHES, page_at(loaded)) == [True] * 4
    assert (saved.pool.kv_buffer.float() - loaded.pool.kv_buffer.float()).square().mean() < 0.012


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_packed_pages_pass_through_a_pool_of_any_layout(client, layout):
    settings = dataclasses.replace(SETTINGS, codec="tq4")
    saved, loaded = packed_pool(seed=1, layout=layout), packed_pool()
    save(client, saved, settings)
    store = open_page_store(client, settings, loaded.shape, PLACE)
    assert store.load(HASHES, page_at(loaded)) == [True] * 4
    for place in range(4):
        assert torch.equal(page_at(loaded)(place), page_at(saved)(place))
    assert store.counters.loaded_bytes == 4 * (store.stored_page_bytes + HEADER_BYTES)


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_packed_pages_are_copied_once_into_a_pool_of_any_layout(near_client, client, layout, monkeypatch):
    saved, settings = packed_pool(seed=1), dataclasses.replace(SETTINGS, codec="tq4")
    save(near_client, saved, settings)
    monkeypatch.setattr(PackedCodec, "empty", None)  # no page is staged
    for each in (near_client, client):  # the second one goes by streams
        loaded = packed_pool(layout=layout)
        store = open_page_store(each, settings, loaded.shape, PLACE)
        assert store.load(HASHES, page_at(loaded)) == [True] * 4
        assert all(torch.equal(page_at(loaded)(place), page_at(saved)(place)) for place in range(4))


@pytest.mark.parametrize("saver", [1, 2])
def test_packed_pages_are_cut_by_heads_where_they_lie(client, saver):
    settings = dataclasses.replace(SETTINGS, codec="tq4", tp_sizes="1,2")
    pools = {1: [packed_pool(seed=1)], 2: [packed_pool(seed=2, heads=1), packed_pool(seed=3, heads=1)]}
    for size in (saver, 3 - saver):
        for rank, pages in enumerate(pools[size]):
            place = dataclasses.replace(PLACE, tp_rank=rank, tp_size=size)
            store = open_page_store(client, settings, pages.shape, place)
            move = store.save if size == saver else store.load
            assert move(HASHES, page_at(pages)) == [True] * 4
    for place in range(4):
        (whole,), halves = ([page_at(pages)(place) for pages in pools[size]] for size in (1, 2))
        sections = torch.cat([half.reshape(2, 1, 1, -1) for half in halves], dim=2)
        assert torch.equal(whole.reshape(2, 1, 2, -1), sections)


@pytest.mark.parametrize("codec", ["none", "tq4"])
def test_a_page_that_is_damaged_on_the_way_is_a_miss_and_so_are_later_ones(near_client, codec, monkeypatch):
    saved, loaded = (packed_pool(1), packed_pool()) if codec == "tq4" else (pool_of(seed=1), pool_of())
    settings = dataclasses.replace(SETTINGS, codec=codec, load_threads=1)
    store = save(near_client, saved, settings)
    view, places = Segment.view, iter([2 * (store.stored_page_bytes + HEADER_BYTES) + 1000])

    def damaged(segment):
        for place in places:
            segment.write(place, bytes([segment.read(place, 1)[0] ^ 1]))
        return view(segment)

    monkeypatch.setattr(Segment, "view", damaged)
    assert store.load(HASHES, page_at(loaded)) == [True, True, False, False]
    assert all(torch.equal(page_at(loaded)(place), page_at(saved)(place)) for place in range(2))
    assert near_client.counters["rejected_blocks"] == 1
    assert (store.counters.loaded_pages, store.counters.failed_pages) == (2, 2)


def test_pages_that_came_before_the_deadline_are_kept(near_client, monkeypatch):
    saved, loaded = packed_pool(seed=1), packed_pool()
    settings = dataclasses.replace(SETTINGS, codec="tq4", load_threads=1, staging_bytes=1)
    store = save(near_client, saved, settings)
    answer, answers = Pending.answer, []

    def late(pending):
        answers.append(pending)
        if len(answers) == 3:
            raise RpcTimeout("too late")
        return answer(pending)

    monkeypatch.setattr(shared_reader, "_BYTES_PER_CALL", 1)
    monkeypatch.setattr(Pending, "answer", late)
    assert store.load(HASHES, page_at(loaded)) == [True, True, False, False]
    assert torch.equal(page_at(loaded)(1), page_at(saved)(1))
    assert not store.guard.is_reachable


def test_pages_are_made_with_the_state_that_the_store_has(client):
    settings = dataclasses.replace(SETTINGS, codec="tq3")
    stateless = save(client, pool_of(seed=1), settings)
    layout = PageLayout(spec=preset("tq3"), head_dim=32, num_kv_heads=2, page_tokens=16)
    namespace = namespace_for(layout, GEOMETRY, model="model", revision="v1")
    state = CodecState(torch.full((2, 2, 32), 2.0))
    agree_on_state(client, namespace, GEOMETRY, lambda: state)
    store = open_page_store(client, settings, pool_of().shape, PLACE)
    assert store._names.namespace.codec_state == state.digest
    assert store.count_present(HASHES) == 0
    assert stateless.count_present(HASHES) == 4
    half = dataclasses.replace(PLACE, tp_rank=1, tp_size=2)
    second = open_page_store(client, settings, pool_of(heads=1).shape, half)
    assert second._names.namespace.codec_state == state.digest
    assert second._codec._balance.shape == (2, 1, 1, 32)


def test_pages_are_made_with_the_state_in_a_file(client, tmp_path):
    state = CodecState(torch.full((2, 2, 32), 2.0))
    file = tmp_path / "state"
    layout = PageLayout(spec=preset("tq3"), head_dim=32, num_kv_heads=2, page_tokens=16)
    namespace = namespace_for(layout, GEOMETRY, model="model", revision="v1")
    file.write_bytes(pack_state(state, namespace, GEOMETRY))
    settings = dataclasses.replace(SETTINGS, codec="tq3")
    store = open_page_store(client, settings, pool_of().shape, PLACE, {STATE_VARIABLE: str(file)})
    assert store._names.namespace.codec_state == state.digest


def test_without_a_store_pages_are_made_without_a_state(caplog):
    config = ClientConfig(address="127.0.0.1:1", lookup_timeout_s=0.2, transfer_timeout_s=0.3)
    with StoreClient(config=config) as client:
        place = dataclasses.replace(PLACE, tp_rank=1, tp_size=2)
        settings = dataclasses.replace(SETTINGS, codec="tq4")
        store = open_page_store(client, settings, pool_of(heads=1).shape, place)
    assert store._names.namespace.codec_state == ""
    assert "rank 1 of 2: no codec state from the store" in caplog.text
    assert "nothing that they share is found" in caplog.text


@pytest.mark.parametrize(
    ("change", "codec", "message"),
    [
        ({"page_tokens": 1}, "tq4", r"cannot pack SGLang's pages \(--page-size\)"),
        ({"head_dim": 24}, "none", "keys of 24 channels, the model's have 32"),
        ({"num_layers": 3}, "none", "the pool holds 3 layers and 2 KV heads"),
        ({"dtype": torch.int8}, "tq4", "the pool holds int8, which cannot be packed"),
        ({"dtype": torch.uint8, "num_layers": 1}, "none", "write the preset of --kv-cache-dtype"),
        (
            {"dtype": torch.uint8, "num_layers": 1},
            "tq4",
            "and those in the pool take 32",
        ),
        ({"page_tokens": 1 << 24}, "none", "use smaller pages"),
    ],
)
def test_pages_that_a_codec_cannot_pack_are_refused(client, change, codec, message):
    shape = dataclasses.replace(pool_of().shape, **change)
    with pytest.raises(ConfigError, match=message):
        open_page_store(client, dataclasses.replace(SETTINGS, codec=codec), shape, PLACE)
