"""What this release of vLLM is served with fits it, and what it is too old for is refused in words."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from engines.signatures import overrides_in, what_differs
from engines.vllm.releases import HAS_FIXED_SEED, HAS_OFFLOADING, HAS_PAGES, HAS_SIX_LAYOUTS
from vllm.config import cache
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.utils.hashing import sha256_cbor, xxhash
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

import tq_connectors.vllm
from tq_connectors.vllm import backend_name, plugin
from tq_connectors.vllm.kv_connector import TQStoreConnector
from tq_connectors.vllm.layout_names import check_layout, layout_of
from tq_connectors.vllm.process_facts import hash_seed
from tq_store.errors import ConfigError

PAGES = {"attention", "backend", "dtypes", "flash", "group", "literal_dtypes", "metadata", "selector"}
OFFLOADING = {"offload_spec", "offload_worker", "secondary_tier", "tier_base"}
OVERRIDES = {
    f"{ours.__name__}.{name}": (ours, name, theirs)
    for ours, name, theirs in overrides_in(
        tq_connectors.vllm,
        "vllm",
        without=(set() if HAS_PAGES else PAGES) | (set() if HAS_OFFLOADING else OFFLOADING),
    )
}
NOT_SERVED = {
    "--kv-cache-dtype: ConfigError: compressed pages in the cache need vLLM 0.29 or later": HAS_PAGES,
    "--attention-backend: ConfigError: compressed pages in the cache need vLLM 0.29 or later": HAS_PAGES,
    "the offloading TQOffloadingSpec: ConfigError: TQOffloadingSpec and TQStoreTier need vLLM 0.30 or later; "
    "TQStoreConnector serves this one": HAS_OFFLOADING,
}


@pytest.fixture(autouse=True)
def nothing_left_broken() -> None:
    """These tests have no server."""


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What ours logs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tq_connectors")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_takes_every_call_of_what_it_overrides(override):
    assert what_differs(*OVERRIDES[override]) == []


def test_the_connector_is_among_the_overrides():
    assert {"TQStoreConnector.get_finished", "TQStoreConnector.__init__"} <= set(OVERRIDES)


def test_the_plugin_says_in_a_line_each_what_is_not_served(lines):
    plugin.register()
    said = [line.partition("has no place for ")[2] for line in lines]
    assert said == [words for words, is_served in NOT_SERVED.items() if not is_served]
    assert all("\n" not in line for line in lines)


def test_a_dtype_is_known_where_a_pool_may_hold_it():
    plugin.register()
    known = getattr(cache, "KV_CACHE_DTYPES", get_args(cache.CacheDType))
    assert ("tq4" in known) == HAS_PAGES
    if HAS_PAGES:
        found = AttentionBackendEnum[backend_name.backend_name()].get_class()
        assert found.get_name() == backend_name.backend_name()


if not hasattr(AttentionBackendEnum, "register"):

    def test_the_only_name_for_backends_is_not_taken_from_another():
        stranger = AttentionBackendEnum["CUSTOM"]
        before = stranger.get_path() if stranger.is_overridden() else None
        backend_name.registry.register_backend(stranger, "their.Backend")
        try:
            with pytest.raises(ConfigError, match=r"its backend CUSTOM is their\.Backend already"):
                backend_name.register_path("our.Backend")
        finally:
            stranger.clear_override()
            if before is not None:
                backend_name.registry.register_backend(stranger, before)


def test_connector_spec_and_tier_are_found_by_name():
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name("TQStoreConnector") is TQStoreConnector
    spec = OffloadingSpecFactory.get_spec_cls({"spec_name": "TQOffloadingSpec"})
    tier = SecondaryTierFactory._registry["TQStoreTier"]()
    if HAS_OFFLOADING:
        return
    for make in (lambda: spec(None), lambda: tier(None, memoryview(b""), "TQStoreTier")):
        with pytest.raises(ConfigError, match=r"need vLLM 0\.30 or later; TQStoreConnector serves this one"):
            make()


def test_hashes_that_no_other_process_has_are_spoken_of(lines, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for algorithm, is_shared in ((sha256_cbor, HAS_FIXED_SEED), (xxhash, False)):
        init_none_hash(algorithm)
        before = len(lines)
        hash_seed()
        said = [line for line in lines[before:] if "no other finds its pages" in line]
        assert len(said) == (not is_shared)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    init_none_hash(sha256_cbor)
    before, fixed = len(lines), hash_seed()
    init_none_hash(sha256_cbor)
    assert hash_seed() == fixed
    assert len(lines) == before


def test_the_layout_is_what_the_engine_says_or_what_we_ask_for(monkeypatch):
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_layout="BLNHC"))
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert TQStoreConnector.get_required_kvcache_layout(config) == ("LBHNC" if HAS_SIX_LAYOUTS else "HND")
    assert layout_of(config) == ("BLNHC" if HAS_SIX_LAYOUTS else "LBHNC")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "NHD")
    assert layout_of(config) == ("BLNHC" if HAS_SIX_LAYOUTS else "LBNHC")


if not HAS_SIX_LAYOUTS:

    def test_a_backend_that_wants_another_layout_stops_the_start():
        head_major = torch.empty(3, 2, 16, 8)
        token_major = torch.empty(3, 16, 2, 8).transpose(1, 2)
        check_layout("LBHNC", [head_major, torch.empty(3, 16, 1, 8).transpose(1, 2)])
        check_layout("LBNHC", [token_major])
        with pytest.raises(ConfigError, match="set VLLM_KV_CACHE_LAYOUT=NHD"):
            check_layout("LBHNC", [token_major])
        with pytest.raises(ConfigError, match="set VLLM_KV_CACHE_LAYOUT=HND"):
            check_layout("LBNHC", [head_major])
