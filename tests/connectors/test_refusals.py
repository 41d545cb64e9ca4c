"""A store that refuses a tenant costs its engine misses and unsaved pages, never an exception."""

from pathlib import Path

import pytest
from store.running_server import WAIT_S, running_server
from store.tenants_file import TenantsFile

from tq_connectors.codec import CacheGeometry
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels import PageLayout, preset

LAYOUT = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, head_dim=64, kv_dtype="float32")
PAGES = bytes(2 * LAYOUT.page_bytes)
TOKENS = range(64)
OTHER_NAMESPACE = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> TenantsFile:
    return TenantsFile(tmp_path)


@pytest.mark.parametrize(
    ("limits", "token", "num_saved"),
    [
        ({}, None, 4),
        ({"keys": 2}, None, 0),
        ({"bytes": 1}, None, 0),
        ({"namespaces": [OTHER_NAMESPACE]}, None, 0),
        ({}, "tqs_" + "0" * 16 + "_" + "0" * 64, 0),
    ],
    ids=["allowed", "too-many-keys", "too-many-bytes", "namespace", "wrong-token"],
)
def test_refusals_are_misses(
    file: TenantsFile, limits: dict[str, object], token: str | None, num_saved: int
) -> None:
    file.add("a", **limits)
    with (
        running_server(tenants_file=file.path) as server,
        file.client(server.address, "a", token=token) as client,
    ):
        cache = PrefixCache(client, LAYOUT, GEOMETRY, model="m", revision="1")
        keys = cache.keys(TOKENS)
        for key in keys:
            assert cache.save(key, PAGES)
        assert cache.saves.flush(WAIT_S)
        assert cache.saves.saved_blocks + cache.saves.failed_blocks == len(keys)
        assert cache.saves.saved_blocks >= num_saved
        loaded = list(cache.load(keys))
        assert len(loaded) >= num_saved
        assert loaded == [PAGES] * len(loaded)
        assert len(loaded) < len(keys) or not (limits or token)
        cache.close()


def test_an_engine_that_calls_too_often_misses_now_and_hits_later(file: TenantsFile) -> None:
    file.add("eager", calls_per_second=1)
    with (
        running_server(tenants_file=file.path) as server,
        file.client(server.address, "eager") as client,
    ):
        cache = PrefixCache(client, LAYOUT, GEOMETRY, model="m", revision="1")
        keys = cache.keys(TOKENS)
        assert [len(list(cache.load(keys))) for _ in range(10)] == [0] * 10
        assert cache.counters.failed_pages == 0
        cache.close()
