"""SGLang's external linker on a real server: the device's pool straight to the store and back."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engines.sglang.disk_server import DiskServer
from engines.sglang.replica_process import PACKED, EngineProcess
from engines.tiny_model import save_tiny_model
from store.running_server import wait_until

pytestmark = pytest.mark.timeout(600)  # several engines start at once
PAGE_TOKENS = 64
PACKED_PAGE_BYTES = 2 * 2 * PAGE_TOKENS * 32
"""Of tq4, without scales: layers, heads, tokens, channels of keys and values at half a byte each."""
STORED = 6 * PAGE_TOKENS


def linked(address: str, codec: str) -> dict[str, Any]:
    """Arguments of an engine whose cache is linked to a store."""
    return {
        "page_size": PAGE_TOKENS,
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "TQCacheLinker",
            "linker_module_path": "tq_connectors.sglang.linker",
            "linker_extra_config": {
                "address": address,
                "revision": "r1",
                "codec": codec,
                "lookup_timeout": "1s",
                "transfer_timeout": "10s",
                "load_wait": "10s",
            },
        },
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskServer]:
    server = DiskServer(tmp_path_factory.mktemp("disk"), PACKED_PAGE_BYTES)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def engines(
    server: DiskServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, EngineProcess]]:
    """One that keeps what it has, one that packs it on the way, and one that has it packed."""
    logs, model = tmp_path_factory.mktemp("logs"), save_tiny_model(tmp_path_factory.mktemp("model"))
    arguments = {
        "keeping": linked(server.address, "none"),
        "packing": linked(server.address, "tq4"),
        "packed": linked(server.address, "tq4") | PACKED,
    }
    engines = {
        name: EngineProcess(logs / name, model_path=str(model), **each) for name, each in arguments.items()
    }
    yield engines
    for engine in engines.values():
        engine.stop()


@pytest.fixture
def prompt(server: DiskServer) -> list[int]:
    """Six pages and four tokens, of its own for each test, and nothing in the store."""
    server.purge()
    return next(_PROMPTS)


_PROMPTS = ([(seed * 31 + place * 7) % 500 for place in range(STORED + 4)] for seed in itertools.count())


def cold(engine: EngineProcess, prompt: list[int]) -> list[int]:
    """What a replica makes of a prompt that nobody has cached."""
    made = engine.generate(prompt)
    assert made["cached"] == 0
    return made["tokens"]


def test_pages_are_restored_from_the_store(engines, server, prompt):
    engine = engines["keeping"]
    tokens = cold(engine, prompt)
    server.wait_until_stored(6)
    engine.flush()
    made = engine.generate(prompt)
    assert (made["tokens"], made["cached"]) == (tokens, STORED)
    again = engine.generate(prompt)  # from the device, where it is by now
    assert (again["tokens"], again["cached"]) == (tokens, STORED)


def test_a_packed_cache_shares_its_pages_with_one_that_packs_on_the_way(engines, server, prompt):
    packed, packing = engines["packed"], engines["packing"]
    cold(packed, prompt)
    server.wait_until_stored(6)
    packed.flush()
    hit = packed.generate(prompt)
    assert hit["cached"] == STORED
    # it reads the same pages, inflated; further tokens read new ones, which it keeps as they are
    assert packing.generate(prompt, num_new=1)["tokens"] == hit["tokens"][:1]
    packed.flush()
    assert packed.generate(prompt) == hit


def test_pages_that_were_packed_on_the_way_are_restored(engines, server, prompt):
    packing, packed = engines["packing"], engines["packed"]
    cold(packing, prompt)
    server.wait_until_stored(6)
    hit = packed.generate(prompt)
    assert hit["cached"] == STORED
    packing.flush()
    again = packing.generate(prompt)
    assert (again["tokens"][0], again["cached"]) == (hit["tokens"][0], STORED)


def test_without_a_server_requests_go_on_and_with_one_pages_are_found_again(engines, server, prompt):
    engine = engines["keeping"]
    engine.wait_until_ready()
    started = time.monotonic()
    tokens = cold(engine, prompt)
    cold_s = time.monotonic() - started
    server.wait_until_stored(6)
    server.stop()
    engine.flush()
    started = time.monotonic()
    assert cold(engine, prompt) == tokens
    assert time.monotonic() - started < 2 * cold_s + 4  # a lookup's deadline is a second
    server.start()

    def is_hit() -> bool:
        engine.flush()
        made = engine.generate(prompt)
        assert made["tokens"] == tokens
        return made["cached"] == STORED

    wait_until(is_hit)  # the store is left alone for a while
    assert engine.log().count("the store fails, everything is a miss until it works") == 1


def test_a_damaged_page_is_a_miss_and_no_request_is_aborted(engines, server, prompt):
    engine = engines["packing"]
    tokens = cold(engine, prompt)
    server.wait_until_stored(6)
    server.stop()
    server.damage()
    server.start()
    engine.flush()
    assert cold(engine, prompt) == tokens
    assert "aborting" not in engine.log()
