"""Servers restarted one after the other while engines work: no request fails, and hits come back.

Two servers over one Redis, a disk each; on both an engine by its port and one by its Unix socket. Each server
in turn gets SIGTERM, drains, and is started again at its address; now and then one is killed instead.
"""

import signal
import threading

from faults.replica_process import ReplicaProcess
from faults.trial import Trial
from faults.workload import check_log
from store.redis_process import RedisProcess
from store.server_process import ServerProcess

_RESTARTS = 8
_KILL_EVERY = 4


def run(trial: Trial) -> None:
    redis_directory = trial.directory / "redis"
    redis_directory.mkdir()
    redis = RedisProcess(redis_directory)
    options = [
        (
            *("--redis-url", redis.url, "--memory-budget", "2MiB", "--grace", "5s"),
            *("--disk-path", trial.directory / name, "--disk-budget", "1GiB"),
            *("--local-socket", trial.directory / f"{name}.socket"),
        )
        for name in ("first", "second")
    ]
    servers = [ServerProcess(*each) for each in options]
    addresses = [server.address for server in servers]
    addresses += [f"unix:{trial.directory / name}.socket" for name in ("first", "second")]
    engines = [ReplicaProcess(address, trial.result, seed=trial.rng.getrandbits(32)) for address in addresses]
    try:
        for restart in range(trial.times(_RESTARTS, least=2)):
            number = restart % 2
            _pause(trial)
            _stop(trial, servers[number], is_killed=restart % _KILL_EVERY == _KILL_EVERY - 1)
            address = servers[number].address
            servers[number].close()
            _pause(trial)
            servers[number] = ServerProcess(*options[number], listen=address)
            trial.result.count("restarts")
        _pause(trial)
        for engine in engines:
            engine.finish()
        for server in servers:
            check_log(trial.result, server.log())
    finally:
        for engine in engines:
            engine.kill()
        for server in servers:
            server.close()
        redis.kill()


def _stop(trial: Trial, server: ServerProcess, *, is_killed: bool) -> None:
    if is_killed:
        server.kill()
        trial.result.count("kills")
        return
    server.send(signal.SIGTERM)
    code, log = server.end()
    trial.result.expect(code == 0 and "are cut" not in log, f"a drain ended with {code}: {log[-1000:]}")
    check_log(trial.result, log)


def _pause(trial: Trial) -> None:
    threading.Event().wait(trial.rng.uniform(0, 0.8))
