"""Time the store against C clients of Redis and LMCache's clients, on this machine, in one run.

    python -m benchmarks.store                       everything, in about five minutes
    python -m benchmarks.store --quick               seconds: does it run at all; its numbers mean nothing
    python -m benchmarks.store --only get --blocks 4     some operations, some block sizes in MiB
    python -m benchmarks.store --lmcache-python V/bin/python     LMCache's clients too, from their own place

Operations: `get` and `put` carry one block a call, as redis-benchmark's requests do; `load` gets a prefix of
16 blocks in one call, as an engine does; `lookup` asks for a prefix of 128 keys. Tiers: `memory` is our
client and server over loopback TCP, gets through pipes; `memory-grpc` the same through grpc's streams alone;
`memory-shared` the same server through shared memory; `redis` a server whose memory holds no block, so that
each comes from Redis, and a put counts when Redis has it; `redis-grpc`, `redis-shared` that server likewise.
`stored` is the cost of small blocks with ever more of them stored, `resident` the most memory that a server
took for its budget.

An environment for LMCache 0.5: python -m venv V; V/bin/pip install torch numpy redis msgspec; then
V/bin/pip install --no-deps lmcache==0.5.6 and what it asks for on import.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import store_peers as peers
from benchmarks.circumstances import circumstances
from benchmarks.store_load import Command
from benchmarks.store_peers import Measured, Peer
from benchmarks.store_processes import BenchmarkError, TqStore, Workers, redis_server
from benchmarks.store_rows import RESULTS, Row, append_rows
from benchmarks.store_stored import stored_costs

MIB = 1 << 20
NUM_KEYS = 16
_RESIDENT_BUDGET_BYTES = 1 << 30
_MOST_RESIDENT_S = 60.0
_STORED = (1_000, 10_000, 100_000, 1_000_000)
OPS = ("get", "put", "load", "lookup", "stored", "resident")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    ops: tuple[str, ...]
    blocks_mib: tuple[float, ...]
    clients: tuple[int, ...]
    seconds: float
    stored: tuple[int, ...]
    resident_bytes: int


FULL = Plan(
    ops=OPS,
    blocks_mib=(1.0, 4.0, 8.0),
    clients=(1, 4, 16),
    seconds=0.7,
    stored=_STORED,
    resident_bytes=3 << 30,
)
QUICK = Plan(
    ops=OPS, blocks_mib=(0.25,), clients=(2,), seconds=0.05, stored=(200, 1_000), resident_bytes=8 << 20
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; 0 if every case gave its numbers."""
    parsed = _parser().parse_args(arguments)
    chosen = QUICK if parsed.quick else FULL
    plan = Plan(
        ops=tuple(parsed.only or chosen.ops),
        blocks_mib=tuple(parsed.blocks or chosen.blocks_mib),
        clients=tuple(parsed.clients or chosen.clients),
        seconds=parsed.seconds or chosen.seconds,
        stored=chosen.stored,
        resident_bytes=chosen.resident_bytes,
    )
    facts = circumstances()
    print(f"machine   {facts['machine']}, Python {facts['python']}, load {os.getloadavg()[0]:.1f}")
    print(f"commit    {facts['commit']}", flush=True)
    started = time.monotonic()
    rows: list[Row] = []
    try:
        for row in Bench(plan, parsed.lmcache_python).rows():
            row |= {"commit": facts["commit"], "machine": facts["machine"]}
            row |= {"date": time.strftime("%Y-%m-%d", time.gmtime())}
            if parsed.quick:
                row["note"] = "; ".join(filter(None, ("quick", row.get("note"))))
            rows.append(row)
            print(f"{time.monotonic() - started:5.0f} s  {_line(row)}", flush=True)
    except BenchmarkError as error:
        print(f"no further number: {error}", file=sys.stderr)
        return 1
    finally:
        append_rows(rows, parsed.out)
    print("\nbars, of this run:")
    for line in bars(rows):
        print(f"  {line}")
    print(f"\n{len(rows)} rows added to {parsed.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=OPS, metavar="OP", help="may be repeated")
    parser.add_argument("--blocks", type=float, nargs="+", metavar="MIB", help="(default: 1 4 8)")
    parser.add_argument("--clients", type=int, nargs="+", metavar="N", help="(default: 1 4 16)")
    parser.add_argument("--seconds", type=float, help=f"of each case (default: {FULL.seconds})")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--lmcache-python", type=Path, metavar="PATH", help="a Python that imports lmcache")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="JSON lines to add to (default: %(default)s)",
    )
    return parser


class Bench:
    """One run."""

    def __init__(self, plan: Plan, lmcache_python: Path | None) -> None:
        self._plan = plan
        self._lmcache_python = lmcache_python

    def rows(self) -> Iterator[Row]:
        """Rows as they are measured."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tq-bench-")))
            workers = stack.enter_context(Workers(min(max(self._plan.clients), os.cpu_count() or 1)))
            if {"get", "put", "load", "lookup"} & set(self._plan.ops):
                yield from self._tier_rows(stack, directory, workers)
            if "resident" in self._plan.ops:
                yield self._resident_row(directory, workers)
        if "stored" in self._plan.ops:
            yield from _stored_rows(self._plan.stored)

    def _tier_rows(self, stack: ExitStack, directory: Path, workers: Workers) -> Iterator[Row]:
        port = stack.enter_context(redis_server(directory))
        near, far = directory / "near", directory / "far"
        near.mkdir()
        far.mkdir()
        memory = stack.enter_context(TqStore(near, "--memory-budget", "3GiB"))
        redis = stack.enter_context(
            TqStore(
                far,
                *("--memory-budget", "1KiB", "--redis-url", f"redis://127.0.0.1:{port}/0"),
                *("--write-queue", "2GiB"),
            )
        )
        tiers = {
            "memory": (memory, memory.address, True),
            "memory-grpc": (memory, memory.address, False),
            "memory-shared": (memory, memory.local_address, False),
            "redis": (redis, redis.address, True),
            "redis-grpc": (redis, redis.address, False),
            "redis-shared": (redis, redis.local_address, False),
        }
        held = self._peers(port)
        for block_mib in self._plan.blocks_mib:
            block_bytes = round(block_mib * MIB)
            for address in (memory.address, redis.address):
                workers.run(self._command("fill", address, block_bytes, 1))
            for clients in self._plan.clients:
                for op in ("get", "put", "load", "lookup"):
                    if op not in self._plan.ops or (
                        op in ("load", "lookup") and not self._is_middle(block_mib)
                    ):
                        continue
                    compared = {
                        name: measured
                        for name, ask in held.items()
                        if (self._is_middle(block_mib) or not name.startswith("lmcache"))
                        and (measured := ask(op, block_bytes, clients, self._plan.seconds)) is not None
                    }
                    for tier, (server, address, with_pipes) in tiers.items():
                        if op not in ("get", "load") and tier.endswith("-grpc"):
                            continue  # they differ in gets alone
                        before_s = server.cpu_s()
                        result = workers.run(self._command(op, address, block_bytes, clients, with_pipes))
                        result["cpu_s"] += server.cpu_s() - before_s
                        yield from _rows(op, tier, block_mib, clients, result, compared)
            for address in (memory.address, redis.address):
                workers.run(self._command("drop", address, block_bytes, 1))

    def _is_middle(self, block_mib: float) -> bool:
        """Whether this is the size at which what depends little on sizes is measured."""
        sizes = self._plan.blocks_mib
        return block_mib == sizes[len(sizes) // 2]

    def _peers(self, port: int) -> dict[str, Peer]:
        held: dict[str, Peer] = {"redis-benchmark": peers.redis_benchmark(port, NUM_KEYS)}
        other = peers.memtier(port, NUM_KEYS)
        if other is None:
            print("memtier_benchmark is not installed; its rows are left out", flush=True)
        else:
            held["memtier"] = other
        if self._lmcache_python is None:
            print("no --lmcache-python; LMCache's rows are left out", flush=True)
        else:
            for client in ("resp", "redis"):
                held[f"lmcache-{client}"] = peers.lmcache(self._lmcache_python, port, NUM_KEYS, client)
        return held

    def _command(
        self, op: str, address: str, block_bytes: int, clients: int, with_pipes: bool = True
    ) -> Command:
        return Command(
            op=op,
            address=address,
            block_bytes=block_bytes,
            clients=list(range(clients)),
            seconds=self._plan.seconds,
            start_at=0.0,
            num_keys=NUM_KEYS,
            with_pipes=with_pipes,
        )

    def _resident_row(self, directory: Path, workers: Workers) -> Row:
        """Put far more than the budget holds, from many clients at once, while others read."""
        folder = directory / "resident"
        folder.mkdir()
        clients, block_bytes = max(self._plan.clients), round(max(self._plan.blocks_mib) * MIB / 2)
        with TqStore(folder, "--memory-budget", str(_RESIDENT_BUDGET_BYTES)) as server:
            command = Command(
                op="churn",
                address=server.address,
                block_bytes=block_bytes,
                clients=list(range(clients)),
                seconds=_MOST_RESIDENT_S,
                start_at=0.0,
                num_keys=max(2, self._plan.resident_bytes // clients // block_bytes),
                with_pipes=True,
            )
            result = workers.run(command)
            peak_bytes = server.peak_resident_bytes()
        return {
            "op": "resident",
            "tier": "memory",
            "block_mib": block_bytes / MIB,
            "clients": clients,
            "gib_per_s": result["bytes"] / result["elapsed_s"] / 2**30,
            **_percentiles(result["times_ms"]),
            "peer": "memory_budget",
            "peer_gib_per_s": None,
            "ratio": peak_bytes / _RESIDENT_BUDGET_BYTES,
            "note": f"peak of {peak_bytes / MIB:.0f} MiB for a budget of {_RESIDENT_BUDGET_BYTES // MIB} MiB",
        }


def _rows(
    op: str,
    tier: str,
    block_mib: float,
    clients: int,
    result: dict[str, object],
    compared: dict[str, Measured],
) -> Iterator[Row]:
    """One row for each peer, or one without any."""
    times_ms = result["times_ms"]
    assert isinstance(times_ms, list)
    moved, elapsed_s, cpu_s = result["bytes"], result["elapsed_s"], result["cpu_s"]
    assert isinstance(moved, int)
    assert isinstance(elapsed_s, float)
    assert isinstance(cpu_s, float)
    own: Row = {
        "op": op,
        "tier": tier,
        "block_mib": float(block_mib),
        "clients": clients,
        "gib_per_s": moved / elapsed_s / 2**30 if moved else None,
        "cpu_s_per_gib": cpu_s / (moved / 2**30) if moved else None,
        **_percentiles(times_ms),
    }
    for name, measured in compared.items() or [(None, None)]:
        row = own | {"peer": name, "peer_gib_per_s": None, "ratio": None}
        if measured is not None:
            row |= {"peer_gib_per_s": measured.gib_per_s, "peer_p50_ms": measured.p50_ms}
            if own["gib_per_s"] and measured.gib_per_s:
                row["ratio"] = own["gib_per_s"] / measured.gib_per_s
            else:
                row["ratio"] = measured.p50_ms / own["p50_ms"]
        yield row


def _stored_rows(counts: Sequence[int]) -> Iterator[Row]:
    """Costs at each count, against those at the first."""
    first: dict[str, float] = {}
    for cost in stored_costs(counts):
        for op, times_ms in cost.times_ms.items():
            percentiles = _percentiles(times_ms)
            first.setdefault(op, percentiles["p50_ms"])
            gib = cost.batch * cost.block_bytes / 2**30
            yield {
                "op": f"stored-{op}",
                "tier": "memory",
                "block_mib": cost.block_bytes / MIB,
                "clients": 1,
                "gib_per_s": None if op in ("lookup", "all") else gib / (percentiles["p50_ms"] / 1000),
                **percentiles,
                "peer": f"{counts[0]} stored",
                "peer_gib_per_s": None,
                "peer_p50_ms": first[op],
                "ratio": first[op] / percentiles["p50_ms"],
                "stored_blocks": cost.stored_blocks,
                "note": f"{cost.batch} blocks a call, without a wire, processor time",
            }


def _percentiles(times_ms: list[float]) -> dict[str, float]:
    return {"p50_ms": times_ms[len(times_ms) // 2], "p99_ms": times_ms[len(times_ms) * 99 // 100]}


def _line(row: Row) -> str:
    speed = f"{row['gib_per_s']:6.2f} GiB/s" if row["gib_per_s"] else " " * 12
    times = f"p50 {row['p50_ms']:8.2f} ms, p99 {row['p99_ms']:8.2f} ms"
    work = f", {row['cpu_s_per_gib']:.2f} s/GiB of processors" if row.get("cpu_s_per_gib") else ""
    versus = f", {row['ratio']:.2f} of {row['peer']}" if row["ratio"] else ""
    if row["op"] == "lookup" and row["ratio"]:
        versus = f", {row['ratio']:.2f}x as fast as {row['peer']}"
    stored = f" {row['stored_blocks']:,} stored" if "stored_blocks" in row else ""
    who = f"{row['op']:13} {row['tier']:13}"
    size = f"{row['block_mib']:g} MiB" if row["block_mib"] >= 0.1 else f"{row['block_mib'] * MIB:.0f} B"
    return f"{who} {size:8} {row['clients']:2} clients{stored}  {speed} {times}{work}{versus}"


def bars(rows: Sequence[Row]) -> Iterator[str]:
    """What was to be reached, and what was."""
    for tier, reach in (("memory", 0.8), ("redis", 0.7)):
        for row in rows:
            is_it = row["op"] == "get" and row["tier"] == tier and row["block_mib"] == 4.0
            if is_it and row["peer"] == "redis-benchmark":
                what = (
                    f"get of 4 MiB from {tier}, {row['clients']} clients: {row['ratio']:.2f} of {row['peer']}"
                )
                yield _judged(what, row["ratio"] >= reach, f"at least {reach}")
    for row in rows:
        if row["op"] == "lookup" and row["clients"] == 1 and row["tier"] == "memory":
            yield _judged(
                f"lookup of 128 keys: {row['p50_ms']:.2f} ms", row["p50_ms"] < 2.0, "less than 2 ms"
            )
            break
    stored = [row for row in rows if row["op"].startswith("stored-")]
    if stored:
        most = max(row["stored_blocks"] for row in stored)
        for row in stored:
            if row["op"] == "stored-all" and row["stored_blocks"] == most:
                what = f"put, get and lookup at {most:,} stored: {1 / row['ratio']:.2f} of {row['peer']}"
                yield _judged(what, row["ratio"] >= 1 / 1.5, "at most 1.5")
    for row in rows:
        if row["op"] == "resident":
            yield _judged(f"memory: {row['ratio']:.2f} of the budget", row["ratio"] <= 1.15, "at most 1.15")


def _judged(what: str, is_reached: bool, bound: str) -> str:
    return f"{'reached' if is_reached else 'MISSED '}  {what} ({bound})"


if __name__ == "__main__":
    sys.exit(main())
