"""Chunks through our spec, workers and tier to a real server, by ranks that need not be as many as before."""

import itertools
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from engines.vllm.offload_ranks import BLOCKS_PER_CHUNK, DIM, HEADS, KEYS, Ranks, offloading_config, tokens_of
from store.running_server import running_server, wait_until
from vllm.utils.hashing import sha256_cbor, xxhash
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_offload.base import LookupResult

from tq_connectors.vllm.offload_spec import TQOffloadingSpec
from tq_connectors.vllm.process_facts import hash_seed
from tq_store.client import StoreClient
from tq_store.errors import ConfigError


@pytest.fixture(autouse=True, scope="module")
def hashes() -> None:
    """As the engine's core does at its start."""
    init_none_hash(sha256_cbor)


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an engine on a CPU: no interpreter of Triton, which other tests use."""
    monkeypatch.setattr("tq_kernels.cache_layers.takes_kernel", lambda device: False)


@pytest.fixture(autouse=True)
def nothing_left_broken() -> None:
    """These tests have servers of their own."""


@pytest.fixture
def server() -> Iterator[str]:
    with running_server() as running:
        yield running.address


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., Ranks]]:
    """Starts engines, and closes them when the test is done."""
    made: list[Ranks] = []

    def start(tp_size: int, address: str, **store: object) -> Ranks:
        made.append(Ranks(tp_size, address=address, **store))
        return made[-1]

    yield start
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize(("saved_by", "loaded_by"), itertools.product([1, 2, 4], [1, 2, 4]))
def test_what_some_ranks_save_any_number_of_ranks_load(start_ranks, server, saved_by, loaded_by):
    writer = start_ranks(saved_by, server)
    for chunk, first in ((0, 1), (1, 5)):
        writer.compute(chunk, range(first, first + BLOCKS_PER_CHUNK))
    writer.store([0, 1], range(1, 9))
    writer.reset()
    reader = start_ranks(loaded_by, server)
    assert [reader.found(chunk) for chunk in (0, 1, 2)] == [LookupResult.HIT] * 2 + [LookupResult.MISS]
    reader.load([0, 1], [8, 3, 2, 6, 1, 11, 4, 5])
    expected = torch.cat([tokens_of(0), tokens_of(1)], dim=2)
    assert torch.equal(reader.read([8, 3, 2, 6, 1, 11, 4, 5]), expected)


def test_a_load_may_begin_in_the_middle_of_a_chunk(start_ranks, server):
    ranks = start_ranks(2, server)
    ranks.compute(0, [1, 2, 3, 4])
    ranks.store([0], [1, 2, 3, 4])
    before = ranks.read([5, 6])
    ranks.load([0], [7, 8], first_block=2)
    assert torch.equal(ranks.read([7, 8]), tokens_of(0)[:, :, 64:])
    assert torch.equal(ranks.read([5, 6]), before)


def test_the_store_has_a_chunk_once_and_as_any_block_of_ours(start_ranks, server):
    writer = start_ranks(4, server, preset="tq4")
    writer.compute(0, [1, 2, 3, 4])
    writer.store([0], [1, 2, 3, 4])
    writer.reset()
    other = start_ranks(1, server, preset="tq4")
    other.compute(0, [1, 2, 3, 4])
    other.store([0], [1, 2, 3, 4])
    other.reset()
    with StoreClient(server) as client:
        assert [tier.num_blocks for tier in client.stats().tiers.values()] == [1]
    assert other.found(0) is LookupResult.HIT
    other.load([0], [5, 6, 7, 8])
    found, expected = other.read([5, 6, 7, 8]).float(), tokens_of(0).float()
    assert ((found - expected).pow(2).mean() / expected.pow(2).mean()).sqrt() < 0.12


def test_without_a_store_everything_is_a_miss_and_goes_on(start_ranks):
    timeouts = {"connect_timeout": "200ms", "lookup_timeout": "200ms", "transfer_timeout": "200ms"}
    ranks = start_ranks(1, "127.0.0.1:1", **timeouts)
    ranks.compute(0, [1, 2, 3, 4])
    ranks.store([0], [1, 2, 3, 4])
    assert ranks.found(1) is LookupResult.MISS
    assert ranks.found(0) is LookupResult.HIT  # it is in host memory
    ranks.reset()
    assert ranks.found(0) is LookupResult.MISS


def test_a_chunk_that_is_gone_when_it_is_promoted_is_a_miss(start_ranks, server, monkeypatch):
    writer = start_ranks(1, server)
    for chunk, first in ((0, 1), (1, 5)):
        writer.compute(chunk, range(first, first + BLOCKS_PER_CHUNK))
    writer.store([0, 1], range(1, 9))
    writer.reset()
    reader = start_ranks(1, server)
    (tier,) = reader.manager.secondary_tiers
    wait_until(lambda: looked_up(reader, tier, 0) and looked_up(reader, tier, 1))
    with StoreClient(server) as client:
        assert client.delete(tier._block_keys(KEYS[:1])) == [True]
    assert [reader.found(chunk) for chunk in (0, 1)] == [LookupResult.MISS, LookupResult.HIT]
    reader.load([1], [1, 2, 3, 4])
    assert torch.equal(reader.read([1, 2, 3, 4]), tokens_of(1))


def looked_up(ranks: Ranks, tier: object, chunk: int) -> bool:
    """Whether the tier knows of a chunk, without promoting it."""
    result = tier.lookup(KEYS[chunk], ranks.context)
    ranks.end_step()
    return result is LookupResult.HIT


def test_an_engine_that_seeds_its_hashes_at_random_is_told_so(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("tq_connectors"), "propagate", True)  # to caplog's handler
    fixed = hash_seed()
    assert not caplog.records
    try:
        init_none_hash(xxhash)
        assert hash_seed() != fixed
        assert "no other finds its pages" in caplog.text
    finally:
        init_none_hash(sha256_cbor)
    assert hash_seed() == fixed


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({}, "revision is missing"),
        ({"revision": "r", "adress": "h:1"}, "did you mean 'address'"),
        (
            {"revision": "r", "num_kv_heads": HEADS, "head_dim": 2 * DIM},
            "num_kv_heads and head_dim are wrong",
        ),
        ({"revision": "r"}, "no config.json of m is here"),
        ({"revision": "r", "page_tokens": 256, "num_kv_heads": HEADS, "head_dim": DIM}, "not whole pages"),
    ],
)
def test_what_is_not_served_stops_the_start(store, message):
    with pytest.raises(ConfigError, match=message):
        TQOffloadingSpec(offloading_config(1, 0, "engine", store))
