"""Two writers of one key: both blocks are sound, and nobody ever sees parts of both.

The format allows it: writers that sum in another order differ in a few codes, and either block may stand for
the key. They race on one server, and on two servers with a disk each over one Redis.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from faults.trial import Trial
from faults.workload import PATIENT, check_log
from store.redis_process import RedisProcess
from store.sample_blocks import NAMESPACE, sample_block, sample_key
from store.server_process import ServerProcess

from tq_store.block import pack_block, parse_header
from tq_store.client import StoreClient
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome

_KEYS = 150
_PAYLOAD_BYTES = (1000, 40_000, 1_500_000)
_ROUND_KEYS = 10
_OF_A_PUT = {PutOutcome.STORED, PutOutcome.PRESENT}


def run(trial: Trial) -> None:
    redis_directory = trial.directory / "redis"
    redis_directory.mkdir()
    redis = RedisProcess(redis_directory)
    options = [
        (
            *("--memory-budget", "4MiB", "--redis-url", redis.url),
            *("--disk-path", trial.directory / name, "--disk-budget", "1GiB"),
        )
        for name in ("first", "second")
    ]
    try:
        with ServerProcess(*options[0]) as first, ServerProcess(*options[1]) as second:
            numbers = range(trial.times(_KEYS, least=_ROUND_KEYS))
            for start in range(0, len(numbers), _ROUND_KEYS):
                shared = numbers[start : start + _ROUND_KEYS]
                addresses = [first.address, trial.rng.choice([first.address, second.address])]
                _race(trial, addresses, shared)
            # what came to rest, from tiers below a memory that holds few of them
            for server in (first, second):
                with StoreClient(server.address, config=PATIENT) as client:
                    _check(trial, client, numbers)
                check_log(trial.result, server.log())
    finally:
        redis.kill()


def _race(trial: Trial, addresses: list[str], numbers: range) -> None:
    """One writer for each address, each with blocks of its own, and readers until both have finished."""
    ended = threading.Event()

    def write(writer: int) -> None:
        with StoreClient(addresses[writer], config=PATIENT) as client:
            outcomes = client.put([version(number, writer) for number in numbers])
        trial.result.expect(set(outcomes) <= _OF_A_PUT, f"one of two writers was told {set(outcomes)}")
        trial.result.count("writes", len(outcomes))

    def read(address: str) -> None:
        with StoreClient(address, config=PATIENT) as client:
            while not ended.is_set():
                _check(trial, client, numbers)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, address) for address in addresses]
        for writing in [pool.submit(write, writer) for writer in range(2)]:
            writing.result()
        ended.set()
        for reading in readers:
            reading.result()


def _check(trial: Trial, client: StoreClient, numbers: range) -> None:
    for position, block in client.get([sample_key(number) for number in numbers]):
        versions = [version(numbers[position], writer)[1] for writer in range(2)]
        if block is not None and block not in versions:
            trial.result.served_wrong(f"block {numbers[position]} is neither of the two that were written")
        elif block is not None:
            trial.result.count("reads")
    rejected = client.counters["rejected_blocks"]
    if rejected:
        trial.result.served_wrong(f"{rejected} blocks of two writers do not verify")


def version(number: int, writer: int) -> tuple[BlockKey, bytes]:
    """What a writer makes of a block: the same header fields over another payload."""
    payload_bytes = _PAYLOAD_BYTES[number % len(_PAYLOAD_BYTES)]
    key, block = sample_block(number, payload_bytes, NAMESPACE)
    if writer == 0:
        return key, block
    return key, pack_block(parse_header(block), random.Random(-number - 1).randbytes(payload_bytes))
