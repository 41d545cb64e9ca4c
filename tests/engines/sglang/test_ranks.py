"""Two ranks save on their own: one rank finds their pages, and of one that dies on the way no half page."""

import itertools
from collections.abc import Iterator

import pytest
from engines.processes import rank_at
from engines.sglang.replica_process import EngineProcess
from engines.tiny_model import KV_HEADS, LAYERS
from faults.proxy import Fault, Kind, proxied
from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient

pytestmark = pytest.mark.timeout(600)  # an engine of two ranks starts beside another
PAGE_TOKENS, NUM_PAGES = 64, 6
PART_BYTES = 2 * LAYERS * PAGE_TOKENS * 32 * 4
"""Keys and values of all layers and tokens of a page, of one head of 32 channels: what a rank saves of it."""
WHOLE_PAGES = 2
SHARED = {"tp_sizes": "1,2"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[StoreClient]:
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection


@pytest.fixture(scope="module")
def engines(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineProcess]]:
    """Of one rank and of two; they start at the same time."""
    folder = tmp_path_factory.mktemp("logs")
    assert KV_HEADS == 2
    with pytest.MonkeyPatch.context() as patch:
        made = []
        for ranks in (1, 2):
            patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "|".join("01"[:ranks]))
            arguments = {"model_path": tiny_model, "page_size": PAGE_TOKENS, "tp_size": ranks}
            hicache = {
                "enable_hierarchical_cache": True,
                "hicache_ratio": 2.0,
                "hicache_io_backend": "direct",
            }
            log = folder / f"ranks{ranks}"
            made.append(EngineProcess(log, **arguments, **hicache, hicache_mem_layout="page_first_direct"))
    yield made
    for engine in made:
        engine.stop()


@pytest.fixture
def prompt() -> list[int]:
    """Six pages and four tokens, of its own for each test."""
    return next(_PROMPTS)


_PROMPTS = (
    [(seed * 37 + place * 11) % 500 for place in range(NUM_PAGES * PAGE_TOKENS + 4)]
    for seed in itertools.count()
)


def num_blocks(client: StoreClient) -> int:
    return client.stats().tiers["memory"].num_blocks


@pytest.mark.parametrize("codec", ["none", "tq4"])
def test_what_some_ranks_save_other_ranks_find(engines, server, client, prompt, codec):
    for saver, loader in (engines, engines[::-1]):
        client.purge(None)
        for engine in engines:
            assert engine.attach(address=server.address, codec=codec, **SHARED)["success"]
        cold = saver.generate(prompt)
        assert cold["cached"] == 0
        wait_until(lambda: num_blocks(client) == 2 * NUM_PAGES)
        hit = loader.generate(prompt)
        assert (hit["cached"], hit["storage"]) == (NUM_PAGES * PAGE_TOKENS, NUM_PAGES * PAGE_TOKENS)
        if codec == "none":
            assert hit["tokens"] == cold["tokens"]


def test_a_rank_killed_while_it_saves_leaves_no_page_that_it_had_not_saved(engines, server, client, prompt):
    """It comes last, as it leaves an engine dead."""
    alone, pair = engines
    assert alone.attach(address=server.address, salt="alone")["success"]
    tokens = alone.generate(prompt)["tokens"]
    wait_until(lambda: num_blocks(client) == NUM_PAGES)
    client.purge(None)
    position = round((WHOLE_PAGES + 0.5) * PART_BYTES)
    fault = Fault(kind=Kind.FREEZE, is_downward=False, position=position, connections=1)
    with proxied(server.address, fault) as proxy:
        assert pair.attach(address=proxy.address, **SHARED)["success"]
        assert pair.generate(prompt)["tokens"] == tokens
        wait_until(lambda: proxy.struck == 1 and num_blocks(client) == NUM_PAGES + WHOLE_PAGES)
        victim = rank_at(pair.pid, proxy.struck_port)
        victim.kill()
        victim.wait(30)
    wait_until(lambda: not server.is_receiving())
    assert num_blocks(client) == NUM_PAGES + WHOLE_PAGES

    assert alone.attach(address=server.address, **SHARED)["success"]
    found = alone.generate(prompt)
    assert found == {
        "tokens": tokens,
        "cached": WHOLE_PAGES * PAGE_TOKENS,
        "storage": WHOLE_PAGES * PAGE_TOKENS,
    }
    wait_until(lambda: num_blocks(client) == 2 * NUM_PAGES)
    alone.flush()
    assert alone.generate(prompt)["storage"] == NUM_PAGES * PAGE_TOKENS
