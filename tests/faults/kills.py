"""`kill -9` of the server, of Redis and of a client while all of them work.

A block counts as acknowledged by the disk tier once `Inspect` has said that it is there and sound. The answer
of a `Put` promises the top tier alone: the lower ones are written behind it.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from faults import writer
from faults.replica_process import child_environment
from faults.trial import Trial
from faults.workload import (
    HASTY,
    PATIENT,
    check_disk_files,
    check_redis_values,
    check_served,
    is_right,
    numbered_block,
)
from store.redis_process import RedisProcess
from store.running_server import wait_until
from store.sample_blocks import NAMESPACE, sample_key
from store.server_process import ServerProcess

from tq_store.client import StoreClient
from tq_store.errors import RpcError

LOOPS = 100
_LOOPS_A_GENERATION = 25
"""Then everything is purged and the server killed, and nothing may come back."""
_LONGEST_WAIT_S = 0.4


def run(trial: Trial) -> None:
    loops = trial.times(LOOPS, least=3)
    number = 0
    for first_loop in range(0, loops, _LOOPS_A_GENERATION):
        directory = trial.directory / str(first_loop)
        directory.mkdir()
        generation = _Generation(trial, directory, number)
        try:
            for loop in range(first_loop, min(first_loop + _LOOPS_A_GENERATION, loops)):
                (generation.kill_server, generation.kill_client, generation.kill_redis)[loop % 3]()
            generation.end()
        finally:
            generation.close()
        number = generation.next_number


class _Generation:
    """A server with disk and Redis below it, and what is known of the blocks that it was given."""

    def __init__(self, trial: Trial, directory: Path, first_number: int) -> None:
        self._trial, self._result = trial, trial.result
        self._first_number = self.next_number = first_number
        self._on_disk: set[int] = set()
        self._in_redis: set[int] = set()
        redis = directory / "redis"
        redis.mkdir()
        self._redis = RedisProcess(redis, "--appendonly", "yes", "--appendfsync", "always")
        self._disk = directory / "disk"
        self._socket = directory / "socket"
        self._options = (
            *("--memory-budget", "4MiB"),
            *("--disk-path", self._disk, "--disk-budget", "8GiB"),
            *("--redis-url", self._redis.url, "--local-socket", self._socket),
        )
        self._server = ServerProcess(*self._options)

    def kill_server(self) -> None:
        with _Load(self) as load:
            self._wait()
            self._server.kill()
            self._result.count("kills")
        self._note(load)
        check_disk_files(self._result, self._disk, self._numbers())
        self._restart_server()
        self._check_acknowledged(load.on_disk)

    def kill_client(self) -> None:
        command = [sys.executable, "-m", writer.__name__, self.any_address(), str(self.next_number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment())
        try:
            assert process.stdout is not None
            process.stdout.readline()
            self._wait()
        finally:
            process.kill()
            rest, _ = process.communicate()
            self._result.count("kills")
        first = self.next_number
        self.next_number += (rest.count(b"\n") + 3) * writer.BLOCKS_A_PUT
        with StoreClient(self._server.address, config=PATIENT) as client:
            check_served(self._result, client, range(first, self.next_number))
        # what the dead client had sent of its last block is no longer held
        wait_until(lambda: not self._server.is_receiving())

    def kill_redis(self) -> None:
        with _Load(self) as load:
            self._wait()
            self._redis.kill()
            self._result.count("kills")
        self._note(load)
        self._check_acknowledged(load.on_disk)
        self._redis.start()
        there = check_redis_values(self._result, self._redis.url, self._numbers())
        for number in self._in_redis - there:
            self._result.lost_acked(f"block {number}, which Redis had flushed")

    def end(self) -> None:
        """Everything once more, then a purge that a kill must not undo."""
        self._check_acknowledged(self._on_disk)
        with StoreClient(self._server.address, config=PATIENT) as client:
            wait_until(lambda: _is_purged(client))
        self._server.kill()
        self._result.count("kills")
        self._restart_server()
        with StoreClient(self._server.address, config=PATIENT) as client:
            for number in check_served(self._result, client, sorted(self._numbers())):
                self._result.served_wrong(f"block {number} came back after it was purged")

    def close(self) -> None:
        self._server.close()
        self._redis.kill()

    def any_address(self) -> str:
        """Of the server: streams on a port, or shared memory beside a Unix socket."""
        return self._trial.rng.choice([self._server.address, f"unix:{self._socket}"])

    def _numbers(self) -> range:
        return range(self._first_number, self.next_number)

    def _wait(self) -> None:
        threading.Event().wait(self._trial.rng.uniform(0, _LONGEST_WAIT_S))

    def _restart_server(self) -> None:
        self._server.close()
        self._server = ServerProcess(*self._options, listen=self._server.address)

    def _note(self, load: "_Load") -> None:
        self._on_disk |= load.on_disk
        self._in_redis |= load.in_redis
        self._result.count("acknowledged", len(load.on_disk))

    def _check_acknowledged(self, newest: set[int]) -> None:
        """Whether the server still has them on disk: the newest ones, and some of the older."""
        older = self._on_disk - newest
        numbers = sorted({*newest, *self._trial.rng.sample(sorted(older), min(20, len(older)))})
        with StoreClient(self._server.address, config=PATIENT) as client:
            for number in set(numbers) - check_served(self._result, client, numbers):
                self._result.lost_acked(f"block {number}: a miss")
            for number in numbers:
                if "disk" not in _tiers_with(client, number):
                    self._result.lost_acked(f"block {number}: not on disk")


class _Load:
    """Writers, a reader and one that asks where blocks are; calls that fail are part of it."""

    def __init__(self, generation: _Generation) -> None:
        self._generation = generation
        self._result = generation._result
        self._seed = generation._trial.rng.getrandbits(32)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._stored: list[int] = []
        self.on_disk: set[int] = set()
        self.in_redis: set[int] = set()
        self._threads = [
            threading.Thread(target=self._loop, args=(generation.any_address(), work))
            for work in (self._write, self._write, self._read, self._inspect)
        ]

    def __enter__(self) -> "_Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _loop(self, address: str, work: Callable[[StoreClient, int], None]) -> None:
        turn = 0
        with StoreClient(address, config=HASTY) as client:
            while not self._ended.is_set():
                try:
                    work(client, turn)
                except RpcError:
                    self._ended.wait(0.01)
                except Exception as error:
                    self._result.failed_request(f"a client raised {error!r}")
                turn += 1

    def _write(self, client: StoreClient, turn: int) -> None:
        with self._lock:
            numbers = range(self._generation.next_number, self._generation.next_number + 3)
            self._generation.next_number = numbers.stop
        client.put([numbered_block(number) for number in numbers])
        with self._lock:
            self._stored.extend(numbers)

    def _read(self, client: StoreClient, turn: int) -> None:
        numbers = self._some(self._seed + turn, 8)
        for position, block in client.get([sample_key(number) for number in numbers]):
            if block is not None and not is_right(numbers[position], block):
                self._result.served_wrong(f"block {numbers[position]} came with other bytes")
        self._ended.wait(0.001)

    def _inspect(self, client: StoreClient, turn: int) -> None:
        with self._lock:
            waiting = [number for number in self._stored if number not in self.on_disk]
        for number in waiting[:10]:
            tiers = _tiers_with(client, number)
            if "disk" in tiers:
                self.on_disk.add(number)
            if "redis" in tiers:
                self.in_redis.add(number)
        self._ended.wait(0.001)

    def _some(self, seed: int, count: int) -> list[int]:
        with self._lock:
            start = max(0, len(self._stored) - count - seed % 20)
            return self._stored[start : start + count]


def _is_purged(client: StoreClient) -> bool:
    """Purge; a tier that still rests after its server was away makes that fail, and be worth repeating."""
    try:
        client.purge(NAMESPACE)
    except RpcError:
        return False
    return True


def _tiers_with(client: StoreClient, number: int) -> set[str]:
    """Tiers that say that they have a sound copy."""
    copies = client.inspect(sample_key(number))
    return {copy.tier for copy in copies if copy.block_bytes and not copy.problem}
