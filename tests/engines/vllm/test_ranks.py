"""Two ranks save, one rank finds: whole pages alone, also where one of the two is killed on the way."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import pytest
from engines.processes import kill_all, rank_at, rank_called
from engines.tiny_model import LAYERS, save_tiny_model
from engines.vllm.conftest import BLOCKS, OFFLOADED_TOKENS, PAGE_TOKENS, connecting, offloading
from engines.vllm.processes import Engine
from faults.proxy import Fault, Kind, Proxy, proxied
from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient

pytestmark = pytest.mark.timeout(600)  # four engines start at once
HEAD_DIM, TOKENS, ANSWER, TOP = 128, 1000, 8, 20
PART_BYTES = 2 * LAYERS * PAGE_TOKENS * HEAD_DIM * 2
"""Keys and values of all layers and tokens of a page, of one head in bf16: what a rank of two saves of it."""
CHUNK_BYTES = 2 * PART_BYTES * OFFLOADED_TOKENS // PAGE_TOKENS
WHOLE_PAGES = 2
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20}
"""All engines fit on two GPUs; on a CPU it means nothing."""


def frozen_after(num_bytes: float) -> Fault:
    """The first connection that has sent so much sends nothing more."""
    return Fault(kind=Kind.FREEZE, is_downward=False, position=round(num_bytes), connections=1)


@dataclass(frozen=True)
class Engines:
    """An engine of one rank, and one of two behind a proxy, which find so many tokens together."""

    one: Engine
    two: Engine
    proxy: Proxy
    unit: int

    @property
    def findable(self) -> int:
        return (TOKENS - 1) // self.unit * self.unit


@pytest.fixture(autouse=True)
def nothing_left_broken() -> None:
    """These tests have a server of their own."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def all_engines(
    server: ServerProcess, start_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engines]]:
    """They start at the same time, which is what takes longest here."""
    model = save_tiny_model(tmp_path_factory.mktemp("model"), head_dim=HEAD_DIM)

    def start(transfer: dict[str, Any], ranks: int) -> Engine:
        tiny = {"model": str(model), "skip_tokenizer_init": True, "max_num_batched_tokens": OFFLOADED_TOKENS}
        return start_engine(transfer, **BLOCKS, **tiny, **MEMORY, tensor_parallel_size=ranks)

    kinds = {
        "connector": (partial(connecting, most_ranks=2), (WHOLE_PAGES + 0.5) * PART_BYTES, PAGE_TOKENS),
        "offloading": (offloading, 3.5 * CHUNK_BYTES, OFFLOADED_TOKENS),
    }
    made = {}
    with ExitStack() as stack:
        for kind, (transfer, num_bytes, unit) in kinds.items():
            proxy = stack.enter_context(proxied(server.address, frozen_after(num_bytes)))
            one, two = (
                start(transfer(address, preset="raw"), ranks)
                for address, ranks in ((server.address, 1), (proxy.address, 2))
            )
            made[kind] = Engines(one, two, proxy, unit)
        yield made


@pytest.fixture
def client(server: ServerProcess) -> Iterator[StoreClient]:
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection


@pytest.fixture
def prompt() -> list[int]:
    """Of its own for each test."""
    return next(_PROMPTS)


_PROMPTS = ([3 + (seed * 37 + place * 11) % 500 for place in range(TOKENS)] for seed in itertools.count())


def num_blocks(client: StoreClient) -> int:
    return client.stats().tiers["memory"].num_blocks


def answer(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    (made,) = engine.run([prompt], ANSWER, logprobs=TOP)
    return made


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Ranks add up in another order, and in bf16; nothing else may differ."""
    expected, found = one["logprobs"][0], other["logprobs"][0]
    shared = expected.keys() & found.keys()
    assert len(shared) > TOP - 3
    assert sum(math.exp(expected[token]) * (expected[token] - found[token]) for token in shared) < 0.01


@pytest.mark.parametrize("kind", ["connector", "offloading"])
def test_what_one_rank_saves_two_find(all_engines, client, prompt, kind):
    engines = all_engines[kind]
    cold = answer(engines.one, prompt)
    engines.one("settle")
    hit = answer(engines.two, prompt)
    assert (cold["cached"], hit["cached"]) == (0, engines.findable)
    assert_alike(cold, hit)


def test_a_rank_killed_while_it_saves_leaves_no_page_that_it_had_not_saved(
    all_engines, server, client, prompt
):
    """Ranks of the connector save on their own. An engine is dead after this."""
    engines, num_pages = all_engines["connector"], TOKENS // PAGE_TOKENS
    cold = answer(engines.two, prompt)
    assert cold["cached"] == 0
    wait_until(lambda: engines.proxy.struck == 1 and num_blocks(client) == num_pages + WHOLE_PAGES)
    kill(rank_at(engines.two.pid, engines.proxy.struck_port))
    kill_all(engines.two.pid)
    wait_until(lambda: not server.is_receiving())
    assert num_blocks(client) == num_pages + WHOLE_PAGES

    hit = answer(engines.one, prompt)
    assert hit["cached"] == WHOLE_PAGES * PAGE_TOKENS
    assert_alike(cold, hit)
    engines.one("settle")
    assert num_blocks(client) == 2 * num_pages


def test_a_rank_killed_while_chunks_are_saved_leaves_whole_ones(all_engines, server, client, prompt):
    """Ranks of the offloading share host memory, whose whole chunks are sent. An engine is dead then."""
    engines, num_chunks = all_engines["offloading"], TOKENS // OFFLOADED_TOKENS
    engines.two.send("run", prompts=[prompt], max_tokens=ANSWER)
    wait_until(lambda: engines.proxy.struck == 1)
    kill(rank_called(engines.two.pid, "TP1"))
    kill_all(engines.two.pid)
    wait_until(lambda: not server.is_receiving())
    num_whole = num_blocks(client)
    assert 0 < num_whole < num_chunks

    cold = answer(all_engines["connector"].one, prompt)
    hit = answer(engines.one, prompt)
    assert cold["cached"] == 0
    assert 0 < hit["cached"] <= num_whole * OFFLOADED_TOKENS
    assert_alike(cold, hit)
    engines.one("settle")
    assert num_blocks(client) == num_chunks + 2 * (TOKENS // PAGE_TOKENS)


def kill(process: psutil.Process) -> None:
    """`kill -9`, and no return before it is gone."""
    process.kill()
    process.wait(30)
