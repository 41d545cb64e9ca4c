"""Ranks in processes of their own: what some saved the others load, and a dead one leaves no half page."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from e2e import rank as rank_process
from e2e.rank import DIVISION, NUM_PAGES, PATIENT, Rank, engine
from faults.proxy import Fault, Kind, proxied
from faults.replica_process import child_environment
from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient

ENGINES = {
    "tp1": engine(1),
    "tp2": engine(2),
    "tp4": engine(4),
    "tp8": engine(8),
    "pp2": engine(1, (40, 24)),
    "tp2 pp2": engine(2, (40, 24)),
    "tp1 pp3": engine(1, (10, 33, 21)),
}
"""Four KV heads: of eight ranks each pair holds the same one. The last cuts through parts, and only loads."""


class RankProcess:
    """Works as any rank when it is asked to."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", rank_process.__name__, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )

    def ask(self, salt: str, action: str, rank: Rank, is_divided: bool = True) -> None:
        assert self._process.stdin is not None
        print(json.dumps([salt, action, rank, is_divided]), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """`kill -9`, and no return before it is gone."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def rank_processes(address: str, count: int) -> Iterator[list[RankProcess]]:
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            processes.append(RankProcess(address))
            stack.callback(processes[-1].kill)
        assert [process.answer() for process in processes] == ["ready"] * count
        yield processes


def all_ask(
    processes: list[RankProcess], salt: str, action: str, ranks: list[Rank], is_divided: bool = True
) -> list[Any]:
    """Ranks at work at once, as many as there are processes."""
    answers = []
    for start in range(0, len(ranks), len(processes)):
        at_work = [*zip(processes, ranks[start : start + len(processes)], strict=False)]
        for process, rank in at_work:
            process.ask(salt, action, rank, is_divided)
        answers += [process.answer() for process, _ in at_work]
    return answers


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        yield server


@pytest.fixture(scope="module")
def ranks(server: ServerProcess) -> Iterator[list[RankProcess]]:
    with rank_processes(server.address, 2) as processes:
        yield processes


@pytest.mark.parametrize("saver", ["tp1", "tp2", "tp4", "tp8", "tp2 pp2"])
def test_ranks_load_what_ranks_of_other_engines_saved(ranks: list[RankProcess], saver: str) -> None:
    assert sum(all_ask(ranks, saver, "save", ENGINES[saver])) == NUM_PAGES * len(DIVISION.parts)
    for loader in ENGINES.values():
        assert all_ask(ranks, saver, "load", loader) == [rank.digests for rank in loader]


def test_one_block_a_page_serves_ranks_of_every_engine(ranks: list[RankProcess]) -> None:
    assert all_ask(ranks, "one block", "save", engine(1), is_divided=False) == [NUM_PAGES]
    assert all_ask(ranks, "one block", "save", engine(2), is_divided=False) == [0, 0]
    for loader in ENGINES.values():
        loaded = all_ask(ranks, "one block", "load", loader, is_divided=False)
        assert loaded == [rank.digests for rank in loader]


@pytest.mark.parametrize(
    ("is_divided", "position", "num_blocks", "num_pages"),
    [
        pytest.param(True, 960 << 10, 1, 0, id="within the second part of a page"),
        pytest.param(True, (2048 + 960) << 10, 5, 1, id="within the second part of the second page"),
        pytest.param(False, 2048 << 10, 0, 0, id="within the first block of a whole model"),
    ],
)
def test_a_rank_killed_while_it_saves_leaves_no_page_that_it_had_not_saved(
    server: ServerProcess,
    ranks: list[RankProcess],
    is_divided: bool,
    position: int,
    num_blocks: int,
    num_pages: int,
) -> None:
    salt, savers = f"killed at {position}", engine(2) if is_divided else engine(1)
    all_ask(ranks, salt, "save", savers[:-1], is_divided)
    fault = Fault(kind=Kind.FREEZE, is_downward=False, position=position)
    with StoreClient(server.address, config=PATIENT) as client:
        before = client.stats().tiers["memory"].num_blocks
        with proxied(server.address, fault) as proxy, rank_processes(proxy.address, 1) as [victim]:
            victim.ask(salt, "save", savers[-1], is_divided)
            wait_until(lambda: client.stats().tiers["memory"].num_blocks == before + num_blocks)
            wait_until(lambda: proxy.struck == 1)
    wait_until(lambda: not server.is_receiving())
    for readers in ENGINES.values():
        loaded = all_ask(ranks, salt, "load", readers, is_divided)
        assert loaded == [rank.digests[:num_pages] for rank in readers]

    all_ask(ranks, salt, "save", savers[-1:], is_divided)
    for readers in ENGINES.values():
        loaded = all_ask(ranks, salt, "load", readers, is_divided)
        assert loaded == [rank.digests for rank in readers]
