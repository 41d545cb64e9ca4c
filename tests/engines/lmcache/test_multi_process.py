"""LMCache's multi-process server as a process, with a worker's real calls, across restarts."""

from typing import Any

import pytest
import redis
import torch
from engines.lmcache.objects import checked, plugin
from engines.lmcache.processes import LMCacheServer
from engines.lmcache.worker import Worker
from store.running_server import wait_until

from tq_kernels import PageLayout, preset, reference

LAYERS, HEADS, DIM, PAGE_TOKENS, PAGES = 2, 2, 64, 64, 16
TOKENS = list(range(1000, 1000 + 8 * PAGE_TOKENS))
LAYOUT = PageLayout(spec=preset("tq4"), head_dim=DIM, num_kv_heads=HEADS, page_tokens=PAGE_TOKENS)
FIRST, OTHER = list(range(8)), [15, 9, 12, 8, 14, 10, 13, 11]
SEAL = {"type": "tq", "preset": "none"}
TQ4 = {"type": "tq", "preset": "tq4", "num_kv_heads": HEADS, "head_dim": DIM}


def engine_pages() -> list[torch.Tensor]:
    """Pages of an engine whose cache is ours: bytes ``[pages, tokens, heads, slot bytes]`` of each layer."""
    generator = torch.Generator().manual_seed(7)
    layers = []
    for _ in range(LAYERS):
        keys, values = (torch.randn(8 * PAGE_TOKENS, HEADS, DIM, generator=generator) for _ in range(2))
        pages = torch.zeros(PAGES, PAGE_TOKENS, HEADS, LAYOUT.slot_bytes, dtype=torch.uint8)
        pages[:8] = reference.quantize(keys, values, LAYOUT).view(8, *pages.shape[1:])
        layers.append(pages)
    return layers


def bf16_pages() -> list[torch.Tensor]:
    """Pages of an engine that keeps bf16: keys and values side by side, as vLLM registers them since 0.26."""
    generator = torch.Generator().manual_seed(7)
    shape = (PAGES, PAGE_TOKENS, HEADS, 2 * DIM)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(LAYERS)]


def blank(pages: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(page) for page in pages]


def save_and_settle(url: str, pages: list[torch.Tensor], is_stored: Any, mode: str = "engine_driven") -> None:
    worker = Worker(url, pages, PAGE_TOKENS, mode=mode)
    assert worker.save(TOKENS, FIRST)
    wait_until(is_stored)
    worker.close()


@pytest.mark.parametrize(
    ("transport", "medium", "mode"),
    [
        ("grpc", "store", "engine_driven"),
        ("grpc", "redis", "engine_driven"),
        ("zmq", "store", "engine_driven"),
        ("zmq", "redis", "engine_driven"),
        # LMCache's server maps the pages and copies them itself, as it does with those on a GPU
        ("grpc", "store", "lmcache_driven"),
        ("zmq", "redis", "lmcache_driven"),
    ],
)
def test_compressed_pages_come_back_untouched_after_a_restart(
    transport, medium, mode, server, client, redis_server, salt, tmp_path
):
    address = {"host": "127.0.0.1", "port": redis_server.port, "num_workers": 1}
    adapters = {
        "store": plugin(server.address, salt=salt, codec="tq4"),
        "redis": checked(type="resp", **address) | {"serde": SEAL},
    }
    connection = redis.Redis(port=redis_server.port)
    connection.flushall()
    pages = [page.share_memory_() for page in engine_pages()]

    def num_stored() -> int:
        return client.stats().tiers["memory"].num_blocks if medium == "store" else connection.dbsize()

    with LMCacheServer(tmp_path, transport, adapters[medium]) as lmcache:
        save_and_settle(lmcache.url, pages, lambda: num_stored() == 2, mode)
        if medium == "redis":  # nothing but pages and a header lies there
            sizes = [connection.strlen(name) for name in connection.scan_iter()]
            assert max(sizes) < 4 * PAGE_TOKENS * HEADS * LAYOUT.slot_bytes * LAYERS + 512
        lmcache.restart()
        fetched = [page.share_memory_() for page in blank(pages)]
        worker = Worker(lmcache.url, fetched, PAGE_TOKENS, mode=mode)
        assert worker.look_up(TOKENS) == len(TOKENS)
        assert worker.load(TOKENS, OTHER)
        for before, after in zip(pages, fetched, strict=True):
            assert torch.equal(before[FIRST], after[OTHER])
        assert worker.look_up(list(range(512))) == 0
        worker.close()
    connection.close()


def test_an_engine_in_bf16_is_compressed_and_a_purged_store_is_a_miss(server, client, salt, tmp_path):
    adapter = plugin(server.address, salt=salt, codec="serde:tq4") | {"serde": TQ4}
    pages = bf16_pages()
    with LMCacheServer(tmp_path, "grpc", adapter) as lmcache:
        save_and_settle(lmcache.url, pages, lambda: client.stats().tiers["memory"].num_blocks == 2)
        stored = client.stats().tiers["memory"].used_bytes
        assert 3.4 < sum(page[:8].nbytes for page in pages) / stored < 3.9
        lmcache.restart()
        fetched = blank(pages)
        worker = Worker(lmcache.url, fetched, PAGE_TOKENS)
        assert worker.look_up(TOKENS) == len(TOKENS)
        assert worker.load(TOKENS, OTHER)
        for before, after in zip(pages, fetched, strict=True):
            error = (after[OTHER].float() - before[FIRST].float()).norm() / before[FIRST].float().norm()
            assert 0.05 < error < 0.11
        client.purge(None)
        worker.forget()
        assert worker.look_up(TOKENS) == 0
        worker.close()
        assert "ERROR" not in lmcache.log()


REGISTERED = {  # shape of a layer, where its pages are counted, and the order of its axes in LMCache's words
    "planes of heads by token": ((2, PAGES, PAGE_TOKENS, HEADS, DIM), 1, "NHD"),
    "planes of tokens by head": ((2, PAGES, HEADS, PAGE_TOKENS, DIM), 1, "HND"),
    "pages of planes of heads by token": ((PAGES, 2, PAGE_TOKENS, HEADS, DIM), 0, "NHD"),
    "pages of planes of tokens by head": ((PAGES, 2, HEADS, PAGE_TOKENS, DIM), 0, "HND"),
    "fused, heads by token": ((PAGES, PAGE_TOKENS, HEADS, 2 * DIM), 0, "NHD"),
    "fused, tokens by head": ((PAGES, HEADS, PAGE_TOKENS, 2 * DIM), 0, "HND"),
}


def test_every_layout_of_keys_and_values_that_lmcache_registers_is_packed(server, client, salt, tmp_path):
    adapter = plugin(server.address, salt=salt, codec="serde:tq4") | {"serde": TQ4}
    generator = torch.Generator().manual_seed(7)
    with LMCacheServer(tmp_path, "grpc", adapter) as lmcache:
        for name, (shape, axis, order) in REGISTERED.items():
            client.purge(None)
            pages = [torch.randn(shape, generator=generator).bfloat16() for _ in range(LAYERS)]
            writer = Worker(lmcache.url, pages, PAGE_TOKENS, model=name, kv_layout=order)
            assert writer.save(TOKENS, FIRST)
            wait_until(lambda: client.stats().tiers["memory"].num_blocks == 2)
            writer.forget()
            writer.close()
            fetched = blank(pages)
            reader = Worker(lmcache.url, fetched, PAGE_TOKENS, model=name, kv_layout=order)
            assert reader.look_up(TOKENS) == len(TOKENS), name
            assert reader.load(TOKENS, OTHER), name
            reader.close()
            for before, after in zip(pages, fetched, strict=True):
                wanted = before.index_select(axis, torch.tensor(FIRST)).float()
                found = after.index_select(axis, torch.tensor(OTHER)).float()
                assert 0.05 < (found - wanted).norm() / wanted.norm() < 0.11, name
        assert "ERROR" not in lmcache.log()


@pytest.mark.parametrize("transport", ["grpc", "zmq"])
def test_a_cache_that_cannot_be_packed_is_said_when_it_is_registered(
    transport, server, client, salt, tmp_path
):
    adapter = plugin(server.address, salt=salt, codec="serde:tq4") | {"serde": TQ4}
    module = ["--server-module", '{"module_path": "tq_connectors.lmcache.layout_check"}']
    good = bf16_pages()
    latent = [torch.zeros(PAGES, PAGE_TOKENS, 576, dtype=torch.bfloat16) for _ in range(LAYERS)]  # MLA
    with LMCacheServer(tmp_path, transport, adapter, more=module) as lmcache:
        fits = Worker(lmcache.url, good, PAGE_TOKENS, model="org/fits")
        fits.ping()
        assert "ERROR" not in lmcache.log()
        for model, pages in (("org/mla", latent), ("org/bytes", engine_pages())):
            other = Worker(lmcache.url, pages, PAGE_TOKENS, model=model)
            other.ping()
            other.ping()
            wait_until(lambda model=model: f"nothing of model {model} will be stored" in lmcache.log())
            other.close()
        assert lmcache.log().count("will be stored: the serde was told 2 KV heads of 64 channels") == 2
        assert "LMCache registered torch.bfloat16[2, 256, 576]" in lmcache.log()
        fits.close()


def test_lmcache_does_not_start_with_a_wrong_setting(server, tmp_path):
    adapter = plugin(server.address, codec="tq4")
    del adapter["adapter_params"]["revision"]
    lmcache = LMCacheServer(tmp_path, "zmq", adapter)
    assert lmcache.fails_to_start()
    assert "revision is missing" in lmcache.log()
