"""Cut, lossy, repeating, shuffled, flipped and silent connections between engines and their server.

An engine loads a prefix and saves a few pages through a proxy that strikes once, at a random byte. Whatever
the fault, the engine sees right pages or misses; afterwards the server has nothing but right blocks, and
answers everyone else.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from faults.engine import Engine, engine, pages_of, prompt
from faults.proxy import Fault, Kind, proxied, random_fault
from faults.trial import Trial
from faults.workload import HASTY, PATIENT, check_log
from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient

_HASTY = replace(HASTY, pipes=0)
"""Everything through the fault; a pipe would go round it."""
_ROUNDS = 25
"""Of every kind of fault."""
_AT_ONCE = 6
_PAGES = 12
_SAVED_PAGES = 4
COUNTED_AS = {
    Kind.CUT: "truncations",
    Kind.RESET: "truncations",
    Kind.LOSS: "truncations",
    Kind.DUPLICATE: "duplications",
    Kind.REORDER: "reorderings",
    Kind.FLIP: "flips",
    Kind.STALL: "stalls",
    Kind.FREEZE: "stalls",
}


def run(trial: Trial) -> None:
    with ServerProcess("--disk-path", trial.directory, "--disk-budget", "1GiB") as server:
        with engine(server.address, trial.result, PATIENT) as first:
            first.request(prompt(0, _PAGES))
            trial.result.expect(first.flush() and first.cache.saves.saved_blocks == _PAGES, "a save failed")
        upward, downward = _measure(trial, server)
        faults = [
            random_fault(trial.rng, kind, upward_bytes=upward, downward_bytes=downward)
            for _ in range(trial.times(_ROUNDS))
            for kind in Kind
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            documents = range(1, len(faults) + 1)
            list(pool.map(lambda document, fault: _one(trial, server, document, fault), documents, faults))
        _check_server(trial, server, len(faults))


def _one(trial: Trial, server: ServerProcess, document: int, fault: Fault) -> None:
    """The shared prefix is loaded, and a document of this fault's own saved, over one struck connection."""
    result = trial.result
    with proxied(server.address, fault) as proxy, engine(proxy.address, result, _HASTY) as struck:
        _work(struck, document)
        if proxy.struck:
            result.count(COUNTED_AS[fault.kind], proxy.struck)


def _work(one: Engine, document: int) -> None:
    one.request(prompt(0, _PAGES), saves=False)
    one.request(prompt(document, _SAVED_PAGES))
    one.flush()
    one.request(prompt(document, _SAVED_PAGES), saves=False)


def _measure(trial: Trial, server: ServerProcess) -> tuple[int, int]:
    """Bytes of both directions when nothing is wrong."""
    with proxied(server.address, None) as proxy:
        with engine(proxy.address, trial.result, replace(PATIENT, pipes=0)) as whole:
            _work(whole, 10**6)
        trial.result.expect(whole.cache.counters.loaded_pages == _PAGES + _SAVED_PAGES, "a load failed")
        return proxy.passed[0], proxy.passed[1]


def _check_server(trial: Trial, server: ServerProcess, num_documents: int) -> None:
    """What got through the faults is right, and nothing is held for connections that are gone."""
    with (
        engine(server.address, trial.result, PATIENT) as probe,
        StoreClient(server.address, config=PATIENT) as client,
    ):
        trial.result.expect(probe.request(prompt(0, _PAGES)) == _PAGES, "the prefix is gone")
        for document in range(1, num_documents + 1):
            keys = probe.cache.keys(prompt(document, _SAVED_PAGES))
            for position, block in client.get(keys):
                if block is None:
                    continue
                trial.result.count("saved_through_faults")
                if not block.endswith(pages_of(keys[position])):
                    trial.result.served_wrong(f"page {position} of document {document} was stored wrong")
    wait_until(lambda: not server.is_receiving())
    check_log(trial.result, server.log())
