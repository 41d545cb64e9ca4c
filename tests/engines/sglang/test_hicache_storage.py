"""The storage backend in this process, on SGLang's own host pools: what an engine seldom asks of it."""

from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connectors.sglang.host_pool import HostMemory
from engines.sglang.host_pools import DIM, HEADS, LAYERS, PAGE_TOKENS, host_pool
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.radix_cache import RadixKey
from store.running_server import running_server

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang import hicache_storage, rests
from tq_connectors.sglang.hicache_storage import TQHiCacheStorage
from tq_connectors.sglang.host_pages import read_host_pool
from tq_connectors.sglang.page_hashes import check_page_hashes
from tq_connectors.sglang.page_setup import Place
from tq_store.errors import ConfigError

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
HASHES = [f"{number:064x}" for number in range(3)]
GEOMETRY = CacheGeometry(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32")
SLOTS = torch.arange(3 * PAGE_TOKENS)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server() as server:
        yield server.address


def config_of(address: str, **changes: Any) -> HiCacheStorageConfig:
    values = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "model",
        "extra_config": {"address": address, "revision": "r", "codec": "none"},
    }
    return HiCacheStorageConfig(**(values | changes))


@pytest.fixture
def storage(address: str, request: pytest.FixtureRequest, monkeypatch: Any) -> Iterator[TQHiCacheStorage]:
    """A backend with a host pool, and a namespace of its own."""
    extra = {"address": address, "revision": "r", "codec": "none", "salt": request.node.name}
    made = storage_of(host_pool("page_first"), config_of(address, extra_config=extra), monkeypatch)
    yield made
    made.close()


def storage_of(
    pool: Any, config: HiCacheStorageConfig, monkeypatch: Any, float8: torch.dtype | None = None
) -> TQHiCacheStorage:
    place = Place(model="model", geometry=GEOMETRY, layers=range(LAYERS), float8=float8)
    monkeypatch.setattr(hicache_storage, "read_place", lambda *_, **__: place)
    storage = TQHiCacheStorage(config, {})
    storage.register_mem_pool_host(pool)
    return storage


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_where_sglang_says_that_they_are(layout):
    pool = host_pool(layout)
    pages = read_host_pool(pool)
    pointers, sizes = pool.get_page_buffer_meta(torch.arange(PAGE_TOKENS, 2 * PAGE_TOKENS))
    page = pages.page(PAGE_TOKENS)
    found = [page[side, layer].data_ptr() for layer in range(LAYERS) for side in range(2)]
    assert pointers == (found if layout == "layer_first" else found[:2])
    assert sum(sizes) == pages.shape.page_bytes
    assert torch.equal(pages.view_flat(pool.get_data_page(PAGE_TOKENS)), page)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_memory_of_other_tests_is_laid_out_like_sglangs(layout):
    pool = host_pool(layout)
    num_pages = pool.size // PAGE_TOKENS
    sizes = {"num_pages": num_pages, "page_size": PAGE_TOKENS, "layers": LAYERS, "heads": HEADS, "dim": DIM}
    memory = HostMemory(layout, **sizes, dtype=torch.float32)
    memory.kv_buffer.copy_(pool.kv_buffer)
    for flat in (True, False):
        assert torch.equal(memory.get_data_page(64, flat=flat), pool.get_data_page(64, flat=flat))
    assert memory.get_dummy_flat_data_page().shape == pool.get_dummy_flat_data_page().shape


def test_pages_one_by_one(storage):
    pool = storage.mem_pool_host
    page = pool.get_data_page(0)
    assert not storage.exists(HASHES[0])
    assert storage.get(HASHES[0]) is None
    assert storage.set(HASHES[0], page)
    assert not storage.set(HASHES[1])
    assert storage.exists(HASHES[0])
    assert torch.equal(storage.get(HASHES[0]), page)
    target = pool.get_dummy_flat_data_page()
    assert storage.get(HASHES[0], target) is target
    assert torch.equal(target, page)


@pytest.mark.parametrize("codec", ["none", "k8v4"])
def test_an_fp8_cache_is_saved_and_restored(address, codec, monkeypatch):
    float8 = torch.float8_e4m3fn
    pool, extra = host_pool("page_first", float8), {"address": address, "revision": codec, "codec": codec}
    storage = storage_of(pool, config_of(address, extra_config=extra), monkeypatch, float8)
    before = pool.kv_buffer.view(float8).float()[:, : len(SLOTS)].clone()
    assert storage.batch_set_v1(HASHES, SLOTS) == [True] * 3
    pool.kv_buffer.zero_()
    assert storage.batch_get_v1(HASHES, SLOTS) == [True] * 3
    after = pool.kv_buffer.view(float8).float()[:, : len(SLOTS)]
    error = (after - before).square().mean() / before.square().mean()
    assert error == 0 if codec == "none" else 0 < error < 0.02
    storage.close()


def test_what_was_moved_is_exported_once(storage):
    assert storage.batch_set_v1(HASHES, SLOTS) == [True] * 3
    assert storage.batch_get_v1(HASHES, SLOTS) == [True] * 3
    metrics = storage.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([3], [3])
    assert metrics.backup_bandwidth[0] > 0
    assert metrics.prefetch_bandwidth[0] > 0
    assert storage.get_stats().backup_pgs == []
    assert storage.counters["loaded_pages"] == 3


def test_what_goes_wrong_in_us_is_a_miss(storage, monkeypatch, caplog):
    for name in ("count_present", "load", "save"):
        monkeypatch.setattr(storage._store, name, lambda *_: 1 / 0)
    assert storage.batch_exists(HASHES) == 0
    assert storage.batch_get_v1(HASHES, SLOTS) == [False] * 3
    assert storage.batch_set_v1(HASHES, SLOTS) == [False] * 3
    assert storage.batch_get(HASHES) == [None] * 3
    assert storage.batch_set(HASHES, [storage.mem_pool_host.get_data_page(0)] * 3) is False
    assert caplog.text.count("ZeroDivisionError") == 5


def test_a_page_of_a_draft_model_is_a_miss(storage):
    """SGLang 0.5.17 asks for them under keys of their own, with pages of another shape."""
    draft = torch.zeros(7)
    assert storage.batch_set([f"{HASHES[0]}.draft"], [draft]) is False
    assert storage.batch_get([f"{HASHES[0]}.draft"], [draft]) == [None]


def test_clearing_without_a_store_does_nothing(monkeypatch, caplog):
    extra = {"address": "127.0.0.1:1", "revision": "r", "codec": "none", "lookup_timeout": "100ms"}
    storage = storage_of(host_pool("page_first"), config_of("", extra_config=extra), monkeypatch)
    storage.clear()
    assert "pages stay in the store" in caplog.text
    storage.close()
    storage.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_mla_model": True}, "one latent"),
        ({"should_split_heads": True}, "write tp_sizes"),
        ({"attn_cp_size": 2}, "context parallelism"),
    ],
)
def test_models_and_engines_that_are_not_served_are_refused(address, change, message):
    with pytest.raises(ConfigError, match=message):
        TQHiCacheStorage(config_of(address, **change), {})


def test_caches_besides_keys_and_values_are_refused(storage):
    storage.register_mem_host_pool_v2(storage.mem_pool_host, PoolName.KV)
    with pytest.raises(ConfigError, match="a cache of mamba besides"):
        storage.register_mem_host_pool_v2(storage.mem_pool_host, PoolName.MAMBA)


def test_adapters_are_served_where_sglang_hashes_them():
    """0.5.17 does not, and 0.5.23 does."""
    tokens = array("q", range(PAGE_TOKENS))
    is_told_apart = page_hashes(RadixKey(tokens, "adapter")) != page_hashes(RadixKey(tokens, "another"))
    arguments = SimpleNamespace(enable_lora=True)
    with nullcontext() if is_told_apart else pytest.raises(ConfigError, match="no LoRA adapters"):
        check_page_hashes(arguments, utils)


def page_hashes(key: RadixKey) -> list[str]:
    """Of a request that begins with the key, as SGLang's cache makes them."""
    return utils.compute_node_hash_values(SimpleNamespace(key=key, parent=None), PAGE_TOKENS)


def test_the_scheduler_rests_while_pages_of_ours_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now_s = [0.0]
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: now_s[0])
    monkeypatch.setattr(rests, "time", clock)
    ours, other = object.__new__(TQHiCacheStorage), object()
    ours.rests = rests.Rests()

    def round_of(seconds: float, storage: object, on_their_way: dict[str, int]) -> None:
        now_s[0] += seconds
        controller = SimpleNamespace(storage_backend=storage)
        rests.rest_for_loads(
            None, SimpleNamespace(ongoing_prefetch=on_their_way, cache_controller=controller)
        )

    round_of(5.0, ours, {})
    round_of(5.0, other, {"request": 1})
    rests.rest_for_loads(None, SimpleNamespace())
    assert not slept
    for seconds in (5.0, 0.0002, 0.003, 0.0002):  # a decode step takes milliseconds
        round_of(seconds, ours, {"request": 1})
    assert slept == [rests.REST_S, rests.IDLE_REST_S, rests.REST_S, rests.IDLE_REST_S]
