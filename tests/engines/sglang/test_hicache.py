"""SGLang's hierarchical cache on a real server: shared, restored, damaged, refused and without a store."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines.sglang.disk_server import DiskServer
from engines.sglang.replica_process import PACKED, EngineProcess, storage
from engines.tiny_model import save_tiny_model
from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient

pytestmark = pytest.mark.timeout(600)  # several engines start at once
PAGE_TOKENS = 64
PAGE_BYTES = 2 * 2 * PAGE_TOKENS * 2 * 32 * 4
"""Layers, keys and values, tokens, heads, channels, float32."""
STORED = 6 * PAGE_TOKENS
"""Tokens in the whole pages of a prompt."""
HICACHE = {"enable_hierarchical_cache": True, "hicache_ratio": 2.0, "hicache_io_backend": "direct"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def all_engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    """Replicas that start at the same time, which is what takes longest here."""
    directory, incomplete = tmp_path_factory.mktemp("logs"), storage(address="127.0.0.1:1")
    del incomplete["revision"]
    extra = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(incomplete),
    }
    arguments: dict[str, dict[str, Any]] = {
        "layer_first": {"hicache_mem_layout": "layer_first"},
        "page_first": {"hicache_mem_layout": "page_first_direct"},
        "packed": {"hicache_mem_layout": "page_first_direct"} | PACKED,
        "incomplete": {"hicache_mem_layout": "layer_first"} | extra,
    }
    engines = {
        name: EngineProcess(
            directory / name, model_path=str(model), page_size=PAGE_TOKENS, **HICACHE, **arguments[name]
        )
        for name in arguments
    }
    yield engines
    for engine in engines.values():
        engine.stop()


@pytest.fixture
def engines(all_engines: dict[str, EngineProcess]) -> tuple[EngineProcess, EngineProcess]:
    """Two replicas, whose host memory is laid out in two ways."""
    return all_engines["layer_first"], all_engines["page_first"]


@pytest.fixture
def disk_server(tmp_path: Path) -> Iterator[DiskServer]:
    server = DiskServer(tmp_path / "disk", PAGE_BYTES)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[StoreClient]:
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection


@pytest.fixture
def prompt() -> list[int]:
    """Six pages and four tokens, of its own for each test."""
    return next(_PROMPTS)


_PROMPTS = ([(seed * 31 + place * 7) % 500 for place in range(STORED + 4)] for seed in itertools.count())


def num_blocks(client: StoreClient) -> int:
    return client.stats().tiers["memory"].num_blocks


def cold(engine: EngineProcess, prompt: list[int]) -> list[int]:
    """What a replica makes of a prompt that nobody has cached."""
    made = engine.generate(prompt)
    assert made["cached"] == 0
    return made["tokens"]


def test_two_replicas_share_a_prefix(engines, server, client, prompt):
    first, second = engines
    for engine in engines:
        assert engine.attach(address=server.address)["success"]
    tokens = cold(first, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    assert second.generate(prompt) == {"tokens": tokens, "cached": STORED, "storage": STORED}
    first.flush()
    assert first.generate(prompt) == {"tokens": tokens, "cached": STORED, "storage": STORED}
    assert second.generate(prompt) == {"tokens": tokens, "cached": STORED, "storage": 0}  # its own by now


def test_the_interface_that_copies_serves_as_well(engines, server, client, prompt):
    first, second = engines
    for engine in engines:
        assert engine.attach(address=server.address, interface_v1=0)["success"]
    tokens = cold(second, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    assert first.generate(prompt) == {"tokens": tokens, "cached": STORED, "storage": STORED}
    assert first.control("clear_hicache_storage")["success"]
    assert num_blocks(client) == 0


@pytest.mark.parametrize("codec", ["tq4", "k8v4"])
def test_pages_are_packed_on_the_way(engines, server, client, prompt, codec):
    first, second = engines
    for engine in engines:
        assert engine.attach(address=server.address, codec=codec)["success"]
    cold(first, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    tier = client.stats().tiers["memory"]
    assert tier.used_bytes < 6 * PAGE_BYTES / (4 if codec == "tq4" else 3)
    hit = second.generate(prompt)
    assert (hit["cached"], hit["storage"]) == (STORED, STORED)
    first.flush()
    assert first.generate(prompt) == hit  # of the same bytes, the same tokens


@pytest.mark.parametrize("other", [{"revision": "r2"}, {"codec": "tq4"}, {"salt": "tenant"}, {"model": "m"}])
def test_another_cache_is_no_hit(engines, server, client, prompt, other):
    first, second = engines
    assert first.attach(address=server.address)["success"]
    assert second.attach(address=server.address, **other)["success"]
    tokens = cold(first, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    assert cold(second, prompt) == tokens
    wait_until(lambda: num_blocks(client) == 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"revison": "r"}, "did you mean 'revision'"),
        ({"codec": "tq5"}, "unknown preset"),
        ({"codec": "tq4", "tp_sizes": "none"}, "tp_sizes is 'none'"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_sentence(engines, server, wrong, message):
    answer = engines[0].attach(address=server.address, **wrong)
    assert not answer["success"]
    assert message in answer["message"]


def test_pages_are_found_after_a_restart_of_the_server_and_missed_meanwhile(engines, disk_server, prompt):
    first = engines[0]
    assert first.attach(address=disk_server.address)["success"]
    started = time.monotonic()
    tokens = cold(first, prompt)
    cold_s = time.monotonic() - started
    disk_server.wait_until_stored(6)
    disk_server.stop()
    first.flush()
    started = time.monotonic()
    assert first.generate(prompt) == {"tokens": tokens, "cached": 0, "storage": 0}
    assert time.monotonic() - started < 2 * cold_s + 4  # a lookup's deadline is a second
    disk_server.start()

    def is_hit() -> bool:
        first.flush()
        made = first.generate(prompt)
        assert made["tokens"] == tokens
        return made["storage"] == STORED

    wait_until(is_hit)  # the store is left alone for a while
    assert first.log().count("the store fails, everything is a miss until it works") == 1


def test_a_damaged_page_is_a_miss(engines, disk_server, prompt):
    first = engines[0]
    assert first.attach(address=disk_server.address)["success"]
    tokens = cold(first, prompt)
    disk_server.wait_until_stored(6)
    disk_server.stop()
    disk_server.damage()
    disk_server.start()
    first.flush()
    assert first.generate(prompt) == {"tokens": tokens, "cached": 0, "storage": 0}


def test_a_replica_finds_its_pages_after_its_own_restart(engines, server, client, prompt):
    first, second = engines
    assert first.attach(address=server.address)["success"]
    tokens = cold(first, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    second.restart()
    assert second.attach(address=server.address)["success"]
    assert second.generate(prompt) == {"tokens": tokens, "cached": STORED, "storage": STORED}


def test_a_packed_cache_shares_its_pages_with_one_that_packs_on_the_way(all_engines, server, client, prompt):
    """`--kv-cache-dtype tq4`, whose pages are moved as they are, and a float32 cache with codec tq4."""
    packed, plain = all_engines["packed"], all_engines["layer_first"]
    for engine in (packed, plain):
        assert engine.attach(address=server.address, codec="tq4")["success"]
    cold(packed, prompt)
    wait_until(lambda: num_blocks(client) == 6)
    packed.flush()
    hit = packed.generate(prompt)
    assert (hit["cached"], hit["storage"]) == (STORED, STORED)
    packed.flush()
    assert packed.generate(prompt) == hit
    made = plain.generate(prompt)  # it reads the same pages, inflated; later tokens are kept as they are
    assert (made["tokens"][0], made["storage"]) == (hit["tokens"][0], STORED)


@pytest.mark.parametrize(("codec", "message"), [("none", "write the preset"), ("tq3", "whose tokens take")])
def test_a_packed_cache_is_refused_another_codec(all_engines, server, codec, message):
    answer = all_engines["packed"].attach(address=server.address, codec=codec)
    assert not answer["success"]
    assert message in answer["message"]


def test_a_setting_that_is_missing_stops_the_start(all_engines):
    engine = all_engines["incomplete"]
    assert engine.fails_to_start()
    assert "revision is missing: which weights" in engine.log()
