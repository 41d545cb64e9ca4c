"""All scenarios by name, in the order in which they run."""

from collections.abc import Callable

from faults import (
    clock,
    flips,
    full_disk,
    kills,
    pipes,
    redis_links,
    rolling_restart,
    shared_memory,
    single_flight,
    slow,
    sockets,
    two_writers,
    version_skew,
    warm_restart,
)
from faults.trial import Trial

SCENARIOS: dict[str, Callable[[Trial], None]] = {
    "kills": kills.run,
    "flips": flips.run,
    "sockets": sockets.run,
    "pipes": pipes.run,
    "redis-links": redis_links.run,
    "shared-memory": shared_memory.run,
    "full-disk": full_disk.run,
    "clock": clock.run,
    "slow": slow.run,
    "single-flight": single_flight.run,
    "warm-restart": warm_restart.run,
    "two-writers": two_writers.run,
    "version-skew": version_skew.run,
    "rolling-restart": rolling_restart.run,
}
