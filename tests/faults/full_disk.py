"""No room: a file system that is full of bytes or of files, a limit on file size, a Redis at its maximum.

The file system is a small tmpfs where this process may mount one; the limit on file size, which needs no
rights, is always tried. Memory goes on serving, what is on disk stays, and nothing of what did not fit shows.
"""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.trial import Trial
from faults.workload import PATIENT, check_disk_files, check_log, check_served
from store.redis_process import RedisProcess
from store.running_server import wait_until
from store.sample_blocks import sample_block, sample_key
from store.server_process import CLI, ServerProcess

from tq_store.client import StoreClient
from tq_store.results import PutOutcome

_BLOCKS = 60
_FILE_LIMIT_BYTES = 120_000


def run(trial: Trial) -> None:
    if _can_mount(trial.directory):
        limits = {"bytes": "size=4m", "files": "size=64m,nr_inodes=300"}
        for name in [*limits][: trial.times(len(limits))]:
            _fill(trial, name, limits[name])
        _start_without_room(trial)
    _limit_file_size(trial)
    _fill_redis(trial)


def _fill(trial: Trial, name: str, options: str) -> None:
    """Fill a disk while serving, restart on the full disk, make room, and see it used."""
    directory = trial.directory / name
    numbers = range(_BLOCKS)
    with _mounted(directory, options):
        disk = ("--disk-path", directory, "--disk-budget", "1GiB", "--memory-budget", "64MiB")
        with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
            stored = client.put([_block(number) for number in numbers])
            trial.result.expect(stored == [PutOutcome.STORED] * _BLOCKS, "a full disk touched memory")
            _wait_for_writes(client, _BLOCKS)
            trial.result.count("writes_without_room", client.stats().counters["dropped_writes"])
            trial.result.expect(_served(trial, client, numbers) == set(numbers), "memory lost a block")
            on_disk = {number for number in numbers if _is_on_disk(client, number)}
            trial.result.expect(0 < len(on_disk) < _BLOCKS, f"{len(on_disk)} blocks on a disk for a few")
            check_log(trial.result, server.log())
            server.kill()
            trial.result.count("kills")
        _check_files(trial, directory, on_disk)
        with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
            for number in on_disk - _served(trial, client, numbers):
                trial.result.lost_acked(f"block {number} on a full disk")
            subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=10000", directory], check=True)
            more = range(_BLOCKS, _BLOCKS + 10)
            client.put([_block(number) for number in more])
            wait_until(lambda: all(_is_on_disk(client, number) for number in more))
            check_log(trial.result, server.log())


def _start_without_room(trial: Trial) -> None:
    """A directory that has no room for the tier's folders stops the start, in words."""
    directory = trial.directory / "none"
    with _mounted(directory, "size=1m,nr_inodes=50"):
        command = [
            *CLI,
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--disk-path",
            directory,
            "--disk-budget",
            "1GiB",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        is_said = "no room for the disk tier" in done.stderr and "Traceback" not in done.stderr
        trial.result.expect(done.returncode != 0 and is_said, f"a start without room said: {done.stderr}")


def _limit_file_size(trial: Trial) -> None:
    """Writes that fail in the middle of a file: larger blocks never show, smaller ones do."""
    directory = trial.directory / "limited"
    numbers = range(_BLOCKS)
    small = {number for number in numbers if len(_block(number)[1]) < _FILE_LIMIT_BYTES}
    disk = ("--disk-path", directory, "--disk-budget", "1GiB")
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (_FILE_LIMIT_BYTES, _FILE_LIMIT_BYTES))
        client.put([_block(number) for number in numbers])
        _wait_for_writes(client, _BLOCKS)
        # a batch with one block that does not fit counts as dropped, those that were written with it too
        wait_until(lambda: all(_is_on_disk(client, number) for number in small))
        trial.result.count("writes_without_room", client.stats().counters["dropped_writes"])
        server.kill()
        trial.result.count("kills")
    _check_files(trial, directory, small)
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        found = _served(trial, client, numbers)
        trial.result.expect(found <= small, "a block came from a file that could not be written")


def _fill_redis(trial: Trial) -> None:
    """A Redis that may not evict refuses, and keeps what it has."""
    directory = trial.directory / "redis"
    directory.mkdir()
    redis = RedisProcess(directory, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    try:
        with (
            ServerProcess("--redis-url", redis.url) as server,
            StoreClient(server.address, config=PATIENT) as client,
        ):
            client.put([_block(number) for number in range(_BLOCKS)])
            _wait_for_writes(client, _BLOCKS, tier="redis")
            trial.result.count("writes_without_room", client.stats().counters["dropped_writes"])
            trial.result.expect(
                _served(trial, client, range(_BLOCKS)) == set(range(_BLOCKS)), "a block is gone"
            )
            check_log(trial.result, server.log())
    finally:
        redis.kill()


def _block(number: int) -> tuple[bytes, bytes]:
    return sample_block(number, 100_000 + number * 7919 % 100_000)


def _served(trial: Trial, client: StoreClient, numbers: range) -> set[int]:
    return check_served(trial.result, client, numbers, block_of=_block)


def _check_files(trial: Trial, directory: Path, acknowledged: set[int]) -> None:
    num_files = check_disk_files(trial.result, directory, range(_BLOCKS), block_of=_block)
    if num_files < len(acknowledged):
        trial.result.lost_acked(f"{len(acknowledged) - num_files} files on a full disk")


def _is_on_disk(client: StoreClient, number: int) -> bool:
    copies = client.inspect(sample_key(number))
    return any(copy.tier == "disk" and copy.block_bytes and not copy.problem for copy in copies)


def _wait_for_writes(client: StoreClient, num_blocks: int, tier: str = "disk") -> None:
    """Until each block is written or was dropped, and some were dropped."""

    def is_over() -> bool:
        stats = client.stats()
        num_dropped = stats.counters["dropped_writes"]
        return num_dropped > 0 and stats.tiers[tier].num_blocks + num_dropped >= num_blocks

    wait_until(is_over)


def _can_mount(directory: Path) -> bool:
    try:
        with _mounted(directory / "probe", "size=1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def _mounted(directory: Path, options: str) -> Iterator[None]:
    """A tmpfs with these options for as long as the block lasts."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tq-faults", directory]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
