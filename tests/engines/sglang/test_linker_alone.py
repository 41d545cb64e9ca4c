"""The linker in this process, on SGLang's own pool: what an engine seldom asks of it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines.sglang.host_pools import DIM, HEADS, LAYERS, PAGE_TOKENS, device_pool
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from store.running_server import running_server, wait_until

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang import linker as linker_module
from tq_connectors.sglang.linker import TQCacheLinker
from tq_connectors.sglang.page_setup import Place
from tq_store.errors import ConfigError

HASHES = [f"{number:064x}" for number in range(2)]
GEOMETRY = CacheGeometry(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32")
SLOTS = torch.arange(PAGE_TOKENS, 3 * PAGE_TOKENS)
"""Two pages of the pool."""
ARGUMENTS = SimpleNamespace(served_model_name="model", model_path="model")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server() as server:
        yield server.address


@pytest.fixture
def pool() -> Any:
    return device_pool()


def params_of(pool: Any, **changes: Any) -> SimpleNamespace:
    """What SGLang hands to a linker, as far as ours looks at it."""
    values = {
        "token_to_kv_pool_allocator": SimpleNamespace(get_kvcache=lambda: pool),
        "page_size": PAGE_TOKENS,
        "attn_tp_cache_group": None,
        "tp_cache_group": None,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_size": 1,
        "mtp_draft_device_pools": (),
        "sidecar_draft_device_pools": (),
    }
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def linker(
    address: str, pool: Any, request: pytest.FixtureRequest, monkeypatch: Any
) -> Iterator[TQCacheLinker]:
    place = Place(model="model", geometry=GEOMETRY, layers=range(LAYERS))
    monkeypatch.setattr(linker_module, "read_place", lambda *_, **__: place)
    page_bytes = 2 * LAYERS * PAGE_TOKENS * HEADS * DIM * 4
    extra = {"address": address, "revision": "r", "codec": "none", "salt": request.node.name}
    extra["fetch_memory"] = str(2 * page_bytes)
    made = TQCacheLinker(ARGUMENTS, params_of(pool), components={ComponentType.FULL}, extra_config=extra)
    yield made
    made.close()


def transfer(hashes: list[str], slots: torch.Tensor | None = None) -> list[PoolTransfer]:
    return [PoolTransfer(name=PoolName.KV, keys=hashes, device_indices=slots)]


def offloaded(linker: TQCacheLinker, hashes: list[str], slots: torch.Tensor) -> bool:
    assert linker.offload(transfer(hashes, slots))
    wait_until(lambda: linker.num_completed_offloads() == 1)
    return linker.pop_completed_offload()


def test_pages_go_to_the_store_and_come_back_layer_by_layer(linker, pool):
    assert linker.lookup("a", transfer(HASHES)) == []
    assert offloaded(linker, HASHES, SLOTS)
    before = [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.zero_()
    assert linker.lookup("b", transfer(HASHES)) == [1, 2]
    assert linker.load("b", transfer(HASHES, SLOTS))
    index = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(index)
    linker.layer_done_counter.wait_until(LAYERS - 1)
    assert linker.finish_layer_wise_loading(index)
    for buffer, original in zip((*pool.k_buffer, *pool.v_buffer), before, strict=True):
        assert torch.equal(buffer[SLOTS], original[SLOTS])
        assert not buffer[3 * PAGE_TOKENS :].any()
    wait_until(lambda: linker.counters["loaded_pages"] == 2)  # counted when all are here


def test_a_load_that_was_queued_can_be_cancelled(linker):
    assert offloaded(linker, HASHES, SLOTS)
    linker.lookup("a", transfer(HASHES))
    assert linker.load("a", transfer(HASHES, SLOTS))
    assert linker.cancel_queued_load("a")
    assert not linker.cancel_queued_load("a")
    assert linker.start_layer_wise_loading() == -1


def test_a_load_that_was_not_looked_up_is_refused(linker):
    assert not linker.load("a", transfer(HASHES, SLOTS))


def test_a_load_that_fails_on_the_device_is_reported(linker, monkeypatch, caplog):
    assert offloaded(linker, HASHES, SLOTS)
    linker.lookup("a", transfer(HASHES))
    assert linker.load("a", transfer(HASHES, SLOTS))
    monkeypatch.setattr(linker._codec, "unpack_layer", lambda *_: 1 / 0)
    assert not linker.finish_layer_wise_loading(linker.start_layer_wise_loading())
    assert "could not be written into the pool" in caplog.text


def test_pages_beyond_the_memory_for_them_are_not_saved(linker):
    many = [f"{number:064x}" for number in range(10, 13)]
    assert not offloaded(linker, many, torch.arange(3 * PAGE_TOKENS))
    assert offloaded(linker, HASHES, SLOTS)
    assert linker.lookup("a", transfer(many)) == []
    assert not linker.offload(transfer([]))


def test_what_goes_wrong_in_us_is_a_miss(linker, monkeypatch, caplog):
    monkeypatch.setattr(linker._store, "save", lambda *_: 1 / 0)
    monkeypatch.setattr(linker._fetches, "begin", lambda *_: 1 / 0)
    assert not offloaded(linker, HASHES, SLOTS)
    assert linker.lookup("a", transfer(HASHES)) == []
    assert caplog.text.count("ZeroDivisionError") == 2


def test_a_reset_forgets_what_is_under_way(linker):
    assert linker.offload(transfer(HASHES, SLOTS))
    linker.lookup("a", transfer(HASHES))
    linker.reset()
    assert linker.num_completed_offloads() == 0
    assert not linker.load("a", transfer(HASHES, SLOTS))


@pytest.mark.parametrize(
    ("change", "components", "message"),
    [
        ({}, {ComponentType.FULL, ComponentType.SWA}, "more than full attention"),
        ({"attn_cp_size": 2}, {ComponentType.FULL}, "context parallelism"),
        ({"sidecar_draft_device_pools": (1,)}, {ComponentType.FULL}, "a draft model"),
    ],
)
def test_what_is_not_served_is_refused(address, pool, change, components, message):
    extra = {"address": address, "revision": "r", "codec": "none"}
    with pytest.raises(ConfigError, match=message):
        TQCacheLinker(ARGUMENTS, params_of(pool, **change), components=components, extra_config=extra)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SimpleNamespace(), "has no keys and values"),
        (SimpleNamespace(k_buffer=[], v_buffer=[], k_scale_buffer=[]), "scales"),
    ],
)
def test_pools_that_are_not_served_are_refused(address, other, message):
    extra = {"address": address, "revision": "r", "codec": "none"}
    with pytest.raises(ConfigError, match=message):
        TQCacheLinker(ARGUMENTS, params_of(other), components={ComponentType.FULL}, extra_config=extra)
