"""Hold `tq-store plan` against transfers of real blocks over links of 1, 5, 10 and 25 Gbit/s.

    python -m benchmarks.store_plan              a minute or two; rows go to results/plan.jsonl
    python -m benchmarks.store_plan --quick      seconds: does it run at all

Each case gets the blocks of one prefix from a server's memory tier over a loopback that is as slow as the
link, shaped by the kernel (`tc`) in a network namespace of its own where that is allowed, else by a proxy.
The client's own limit is measured first, on a loopback that is not shaped: it is what `--client` of `tq-store
plan` takes. Each time is the least of three. Blocks are those of an 8B Llama.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.shaped_link import ShapedProxy, in_shaped_namespace
from benchmarks.store_blocks import bench_block
from benchmarks.store_processes import TqStore, output_of
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.plan import transfer_s
from tq_store.sizing import block_bytes, read_model

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
MODEL = Path(__file__).parent / "models" / "llama-3.1-8b.json"
PAGE_TOKENS = 64
LINKS_GBIT = (1.0, 5.0, 10.0, 25.0)
PRESETS = ("raw", "fp8", "tq4")
_BLOCKS = 32
_REPEATS = 3

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each link and preset; 0 if every case gave its number."""
    parsed = _parser().parse_args(arguments)
    if parsed.inner:
        print(json.dumps(_measured_s(**json.loads(parsed.inner))))
        return 0
    facts = circumstances()
    print(f"machine   {facts['machine']}, commit {facts['commit']}", flush=True)
    links, presets = (LINKS_GBIT, PRESETS) if not parsed.quick else ((0.5,), ("tq4",))
    with parsed.out.open("a", encoding="utf-8") as file:
        for row in rows(links, presets, 4 if parsed.quick else _BLOCKS):
            row |= {"commit": facts["commit"], "machine": facts["machine"]}
            file.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)
    return 0


def rows(links_gbit: Sequence[float], presets: Sequence[str], num_blocks: int) -> Iterator[Row]:
    """One row for each link and preset."""
    model = read_model(MODEL)
    for preset in presets:
        size = block_bytes(model, preset, PAGE_TOKENS)
        free_s = _measured_s(size=size, num_blocks=num_blocks, gbit=None)
        client_gib_per_s = num_blocks * size / 2**30 / free_s
        for gbit in links_gbit:
            case = {"size": size, "num_blocks": num_blocks}
            command = [
                sys.executable,
                "-m",
                "benchmarks.store_plan",
                "--inner",
                json.dumps(case | {"gbit": None}),
            ]
            shaped = in_shaped_namespace(command, gbit)
            if shaped is None:
                measured_s = _measured_s(**case, gbit=gbit)
            else:
                measured_s = float(json.loads(output_of(shaped)))
            predicted_s = transfer_s(num_blocks * size, gbit, client_gib_per_s)
            yield {
                "preset": preset,
                "link_gbit": gbit,
                "tokens": num_blocks * PAGE_TOKENS,
                "block_bytes": size,
                "client_gib_per_s": client_gib_per_s,
                "predicted_s": predicted_s,
                "measured_s": measured_s,
                "ratio": measured_s / predicted_s,
                "shaped_by": "proxy" if shaped is None else "tc",
            }


def _measured_s(*, size: int, num_blocks: int, gbit: float | None) -> float:
    """Least time to get the blocks, through a proxy of this rate or straight."""
    blocks = [bench_block(number, size) for number in range(num_blocks)]
    keys = [key for key, _ in blocks]
    config = ClientConfig(transfer_timeout_s=300.0)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tq-plan-")))
        server = stack.enter_context(TqStore(directory, "--memory-budget", "2GiB"))
        with StoreClient(server.local_address, config=config) as near:
            near.put(blocks)
        address = server.address
        if gbit is not None:
            address = stack.enter_context(ShapedProxy(server.ports, gbit)).address
        with StoreClient(address, config=config) as client:
            list(client.get(keys[:1]))  # connects and finds the window of the link
            return min(_time_of_get(client, keys) for _ in range(_REPEATS))


def _time_of_get(client: StoreClient, keys: Sequence[Any]) -> float:
    started = time.monotonic()
    for _, block in client.get(keys):
        assert block is not None, "a block that was put is a miss"
    return time.monotonic() - started


def _line(row: Row) -> str:
    return (
        f"{row['preset']:5} {row['link_gbit']:5g} Gbit/s ({row['shaped_by']}): {row['measured_s']:.3f} s "
        f"measured, {row['predicted_s']:.3f} s planned, {row['ratio']:.2f}x"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one case, small")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
