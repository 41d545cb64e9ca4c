"""Whether a tenant can tell by the time of an answer that another tenant has a block.

::

    python -m benchmarks.tenant_timing --samples 20000

One tenant fills a server with a memory and a disk tier. Another asks for those keys and for keys that
nobody has, one at a time and in random order, by Lookup and by Get. The line that is printed says for each
method how often the answer for a foreign key took longer than that for an absent one (`auc`; 0.5 is a
coin), and its standard error if there were no difference. The same for the owner's own blocks shows that
the measurement would see a difference.

Falsified by: an `auc` of foreign keys further from 0.5 than four standard errors, in repeated runs.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from store.running_server import running_server
from store.sample_blocks import keys_of, sample_blocks, sample_key
from store.tenants_file import TenantsFile

from tq_store.client import StoreClient
from tq_store.keys import BlockKey

_NUM_BLOCKS = 500
_PAYLOAD_BYTES = 64 << 10
_MEMORY_BYTES = 8 << 20
"""A quarter of what is put: most blocks are on disk only, where a difference would show most."""

Ask = Callable[[BlockKey], object]


def measure(ask: Ask, keys: Sequence[BlockKey], absent: Sequence[BlockKey], num_samples: int) -> list[float]:
    """Seconds of each answer, `num_samples` for keys that are somewhere, then as many for absent ones."""
    rng = random.Random(7)
    order = [rng.choice(keys) for _ in range(num_samples)] + [rng.choice(absent) for _ in range(num_samples)]
    times_s = [0.0] * len(order)
    for position in rng.sample(range(len(order)), len(order)):
        started = time.perf_counter()
        ask(order[position])
        times_s[position] = time.perf_counter() - started
    return times_s


def area_under_curve(times_s: Sequence[float]) -> tuple[float, float]:
    """How often one of the first half took longer than one of the second; its error if none is slower."""
    count = len(times_s) // 2
    ranked = sorted(range(len(times_s)), key=times_s.__getitem__)
    rank_sum = sum(rank for rank, position in enumerate(ranked, 1) if position < count)
    area = (rank_sum - count * (count + 1) / 2) / count**2
    return area, math.sqrt((2 * count + 1) / (12 * count**2))


def compare(client: StoreClient, keys: Sequence[BlockKey], num_samples: int) -> dict[str, float]:
    """Areas for both methods, with all keys of the client's own or of somebody else's."""
    absent = [sample_key(number) for number in range(1 << 20, (1 << 20) + _NUM_BLOCKS)]
    asks: dict[str, Ask] = {
        "lookup": lambda key: client.lookup([key]),
        "get": lambda key: list(client.get([key])),
    }
    shown = {}
    for name, ask in asks.items():
        area, error = area_under_curve(measure(ask, keys, absent, num_samples))
        shown |= {f"{name}_auc": round(area, 4), "error": round(error, 4)}
    return shown


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description="Time answers for foreign and for absent keys.")
    parser.add_argument("--samples", type=int, default=20_000, help="of each kind and method")
    args = parser.parse_args()
    blocks = sample_blocks(_NUM_BLOCKS, _PAYLOAD_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        file = TenantsFile(Path(folder))
        for name in ("owner", "other"):
            file.add(name)
        settings = {
            "tenants_file": file.path,
            "memory_budget_bytes": _MEMORY_BYTES,
            "disk_path": Path(folder) / "disk",
            "disk_budget_bytes": 4 * _NUM_BLOCKS * _PAYLOAD_BYTES,
        }
        with running_server(**settings) as server, file.client(server.address, "owner") as owner:
            owner.put(blocks)
        with (
            running_server(**settings) as server,
            file.client(server.address, "owner") as owner,
            file.client(server.address, "other") as other,
        ):
            foreign = compare(other, keys_of(blocks), args.samples)
            own = compare(owner, keys_of(blocks), max(100, args.samples // 20))
    line = {"samples": args.samples, "foreign": foreign, "own_as_control": own, "cpus": os.cpu_count()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
