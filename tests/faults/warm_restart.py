"""Restarts on a warm disk, and on one that others have been at while no server ran.

Files are cut, lengthened, emptied, overwritten, swapped, replaced by links and pipes, and joined by
files that are none of ours. The server starts, serves what is whole, and nothing else.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from faults.trial import Trial
from faults.workload import PATIENT, check_log, check_served, numbered_block, numbered_blocks
from store.running_server import wait_until
from store.sample_blocks import NAMESPACE, sample_key
from store.server_process import ServerProcess

from tq_store.client import StoreClient

_BLOCKS = 200
_ROUNDS = 4
_DAMAGED = 60


def run(trial: Trial) -> None:
    directory = trial.directory / "disk"
    disk = ("--disk-path", directory, "--disk-budget", "1GiB", "--memory-budget", "64KiB")
    numbers = range(trial.times(_BLOCKS, least=80))
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        client.put(numbered_blocks(numbers))
        server.send(signal.SIGTERM)
        code, log = server.end()
        # what a drain has written is acknowledged as well: it ends with 0 only after the queue is empty
        trial.result.expect(code == 0, f"a drain ended with {code}")
        check_log(trial.result, log)
    whole = set(numbers)
    for _ in range(trial.times(_ROUNDS)):
        with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
            for number in whole - check_served(trial.result, client, numbers):
                trial.result.lost_acked(f"block {number} after a restart")
            trial.result.count("warm_restarts")
            server.kill()
            trial.result.count("kills")
            check_log(trial.result, server.log())
        damaged = trial.rng.sample(sorted(whole), min(_DAMAGED, len(whole) // 2))
        for number in damaged:
            trial.rng.choice(_DAMAGES)(trial, _file(directory, number))
            trial.result.count("files_damaged")
        whole -= set(damaged)
        _litter(trial, directory)
    _check_after_damage(trial, disk, numbers, whole)
    _shrink(trial, directory, numbers)


def _check_after_damage(trial: Trial, disk: tuple[object, ...], numbers: range, whole: set[int]) -> None:
    """Whole blocks are served even when asked for together with damaged ones, and may be put again."""
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        served = check_served(trial.result, client, numbers)
        for number in whole - served:
            trial.result.lost_acked(f"block {number} beside damaged ones")
        for number in served - whole:
            trial.result.served_wrong(f"block {number} was served from a damaged file")
        client.put(numbered_blocks(numbers))
        wait_until(lambda: check_served(trial.result, client, numbers) == set(numbers))
        check_log(trial.result, server.log())


def _shrink(trial: Trial, directory: Path, numbers: range) -> None:
    """A smaller budget drops blocks at the start, and keeps the rest."""
    disk = ("--disk-path", directory, "--disk-budget", "3MiB")
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        held = client.stats().tiers["disk"]
        trial.result.expect(0 < held.used_bytes <= 3 << 20, f"{held.used_bytes} bytes within 3 MiB")
        served = check_served(trial.result, client, numbers)
        trial.result.expect(len(served) == held.num_blocks, f"{len(served)} of {held.num_blocks} blocks came")
        check_log(trial.result, server.log())


def _truncate(trial: Trial, path: Path) -> None:
    os.truncate(path, trial.rng.randrange(path.stat().st_size))
    trial.result.count("truncations")


def _lengthen(trial: Trial, path: Path) -> None:
    with path.open("ab") as file:
        file.write(trial.rng.randbytes(trial.rng.choice([1, 256, 5000])))


def _flip(trial: Trial, path: Path) -> None:
    data = bytearray(path.read_bytes())
    bit = trial.rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    trial.result.count("flips")


def _overwrite(trial: Trial, path: Path) -> None:
    """With as many zeros, as file systems do after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def _swap(trial: Trial, path: Path) -> None:
    """Another sound block under this name."""
    path.write_bytes(numbered_block(10**6)[1])


def _replace_by_link(trial: Trial, path: Path) -> None:
    path.unlink()
    path.symlink_to(trial.rng.choice(["/dev/zero", "/etc/passwd", "nowhere", str(path)]))


def _replace_by_fifo(trial: Trial, path: Path) -> None:
    """A reader of a pipe that nobody writes to would wait for ever."""
    path.unlink()
    os.mkfifo(path)


_DAMAGES: tuple[Callable[[Trial, Path], None], ...] = (
    _truncate,
    _lengthen,
    _flip,
    _overwrite,
    _swap,
    _replace_by_link,
    _replace_by_fifo,
)


def _litter(trial: Trial, directory: Path) -> None:
    """Files that are none of ours, in every folder."""
    for folder in (directory, directory / "blocks", directory / "blocks" / "00", directory / "partial"):
        for name in ("lost+found", ".nfs0001", "0" * 64, f"{'0' * 64}-{'0' * 63}g", f"{'A' * 64}-{'0' * 64}"):
            (folder / name).write_bytes(trial.rng.randbytes(10))
    (directory / "partial" / "folder").mkdir(exist_ok=True)
    (directory / "quarantine" / "folder").mkdir(exist_ok=True)


def _file(directory: Path, number: int) -> Path:
    prefix = sample_key(number)[32:].hex()
    return directory / "blocks" / prefix[:2] / f"{NAMESPACE.hex()}-{prefix}"
