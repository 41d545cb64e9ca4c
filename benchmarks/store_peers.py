"""What a store's numbers are held against: C clients of the same Redis, and LMCache's own."""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.store_processes import BenchmarkError, output_of

_GUESS_BYTES_PER_S = 1 << 30
"""How fast a Redis may be, to choose a number of requests."""
_FEWEST_REQUESTS = 32
LMCACHE_SCRIPT = Path(__file__).parent / "store_lmcache.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one program measured of one operation."""

    gib_per_s: float | None
    p50_ms: float
    p99_ms: float


Peer = Callable[[str, int, int, float], Measured | None]
"""Asked with an operation, bytes of a value, a number of clients and seconds; None where it cannot do it."""


def redis_benchmark(port: int, num_keys: int) -> Peer:
    """`redis-benchmark`, which comes with the server: one C thread, one value a request.

    Raises:
        BenchmarkError: It is not installed.
    """
    binary = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    if binary is None:
        raise BenchmarkError("there is no redis-benchmark; type: apt-get install redis-tools")

    def ask(op: str, value_bytes: int, clients: int, seconds: float) -> Measured | None:
        test = {"get": "get", "put": "set"}.get(op)
        if test is None:
            return None
        requests = max(_FEWEST_REQUESTS, math.ceil(seconds * _GUESS_BYTES_PER_S / value_bytes))
        command = [binary, "-p", str(port), "-d", str(value_bytes), "-c", str(clients), "-r", str(num_keys)]
        if test == "get":  # its gets ask for the keys that its sets have filled
            output_of([*command, "-n", str(4 * num_keys), "-t", "set", "-q"])
        printed = output_of([*command, "-n", str(requests), "-t", test, "--csv"])
        (row,) = csv.DictReader(io.StringIO(printed))
        return Measured(
            gib_per_s=float(row["rps"]) * value_bytes / 2**30,
            p50_ms=float(row["p50_latency_ms"]),
            p99_ms=float(row["p99_latency_ms"]),
        )

    return ask


def memtier(port: int, num_keys: int) -> Peer | None:
    """`memtier_benchmark` with one thread; None where it is not installed."""
    binary = shutil.which("memtier_benchmark")
    if binary is None:
        return None

    def ask(op: str, value_bytes: int, clients: int, seconds: float) -> Measured | None:
        ratio = {"get": "0:1", "put": "1:0"}.get(op)
        if ratio is None:
            return None
        common = [binary, "-s", "127.0.0.1", "-p", str(port), "-t", "1", "-d", str(value_bytes)]
        common += [f"--key-maximum={num_keys}", "--hide-histogram"]
        if op == "get":
            fill = ["-c", "1", "--ratio=1:0", "-n", "allkeys", "--key-pattern=S:S"]
            output_of([*common, *fill])
        timed = ["-c", str(clients), f"--ratio={ratio}", f"--test-time={max(1, round(seconds))}"]
        printed = output_of([*common, *timed, "--json-out-file=/dev/stdout", "-o", "/dev/null"])
        totals = json.loads(printed[printed.index("{") :])["ALL STATS"]["Totals"]
        return Measured(
            gib_per_s=totals["Ops/sec"] * value_bytes / 2**30,
            p50_ms=totals["Percentile Latencies"]["p50.00"],
            p99_ms=totals["Percentile Latencies"]["p99.00"],
        )

    return ask


def lmcache(python: Path, port: int, num_keys: int, client: str) -> Peer:
    """A client of LMCache's, run by a Python that has it: ``resp`` in C++, ``redis`` in Python."""

    def ask(op: str, value_bytes: int, clients: int, seconds: float) -> Measured | None:
        if op not in ("get", "put", "lookup") or (op == "lookup" and client == "redis"):
            return None
        options = [client, op, str(port), str(value_bytes), str(clients), str(seconds), str(num_keys)]
        printed = output_of([str(python), str(LMCACHE_SCRIPT), *options])
        answer = json.loads(printed.splitlines()[-1])
        return Measured(**answer)

    return ask
