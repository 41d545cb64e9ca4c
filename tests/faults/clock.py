"""Clocks that jump: libfaketime moves the wall clock of a server and of an engine while they work.

The monotonic clock is left alone, as it is by NTP and by operators. Deadlines, retries and the time that a
failing tier rests must hang on that one alone. Redis and a second engine keep the right time, as other
machines would (and redis-server does not start under libfaketime).
"""

import shutil
import threading
from pathlib import Path

from faults.replica_process import ReplicaProcess, child_environment
from faults.trial import Trial
from faults.workload import check_log
from store.redis_process import RedisProcess
from store.server_process import ServerProcess

_JUMPS = 24
_LONGEST_WAIT_S = 0.25
_OFFSETS_S = (1, -1, 60, -60, 3600, -3600, 86_400, -86_400, 366 * 86_400, -366 * 86_400, 20 * 366 * 86_400)


def run(trial: Trial) -> None:
    clock = _Clock(trial.directory / "offset")
    disk = trial.directory / "disk"
    redis_directory = trial.directory / "redis"
    redis_directory.mkdir()
    redis = RedisProcess(redis_directory)
    options = (
        *("--disk-path", disk, "--disk-budget", "1GiB", "--memory-budget", "1MiB"),
        *("--redis-url", redis.url),
    )
    try:
        with ServerProcess(*options, environment=clock.environment) as server:
            engines = [
                ReplicaProcess(server.address, trial.result, seed=seed, environment=environment)
                for seed, environment in enumerate((clock.environment, None))
            ]
            for _ in range(trial.times(_JUMPS, least=4)):
                clock.set(0)
                trial.result.count("clock_jumps")
                threading.Event().wait(trial.rng.uniform(0, _LONGEST_WAIT_S))
            for engine in engines:
                engine.finish()
            check_log(trial.result, server.log())
        # files of the future and of the past, found at a time between
        clock.set(0)
        with ServerProcess(*options, environment=clock.environment) as server:
            check_log(trial.result, server.log())
    finally:
        redis.kill()


class _Clock:
    """The wall clock of every process that runs with `environment`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)
        self.environment = child_environment(
            LD_PRELOAD=str(_library()),
            FAKETIME_TIMESTAMP_FILE=str(path),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            NO_FAKE_STAT="1",
        )

    def set(self, offset_s: int) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}\n")
        fresh.rename(self._path)


def _library() -> Path:
    """Where the command `faketime` has its library."""
    command = shutil.which("faketime")
    if command is None:
        raise RuntimeError("no faketime on the PATH; type: apt-get install faketime")
    folders = [Path(command).resolve().parent.parent / name for name in ("lib", "lib64")]
    found = [path for folder in folders for path in folder.rglob("libfaketime.so.1")]
    if not found:
        raise RuntimeError(f"no libfaketime.so.1 next to {command}")
    return found[0]
