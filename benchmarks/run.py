"""Time the GPU kernels against what else a user could pick, on this machine, in one run.

    python -m benchmarks.run --list                  cases and bars; needs no GPU
    python -m benchmarks.run                         everything: tests first, then every case
    python -m benchmarks.run --only decode/tq4       cases with this part in their names, or a glob
    python -m benchmarks.run --peers FOLDER          other projects' kernels too; benchmarks/peers.py says how

No number is taken on a red test, nor of a case whose output is wrong at that very configuration. Times are
medians of CUDA-graph replays that find a cold L2; shares of the roofline are of a copy and a matrix product
measured in the same run. Rows are written as they are measured; with --only, rows of other configurations
that the file holds are kept.
"""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import peers
from benchmarks.circumstances import circumstances
from benchmarks.registry import PEERS, Case, selected
from benchmarks.rows import RESULTS, Row, merged, read_rows, write_rows
from benchmarks.verdict import judged

if TYPE_CHECKING:
    from benchmarks.gpu.session import Session

ROOT = Path(__file__).parents[1]
NO_GPU = (
    "benchmarks.run times kernels on an NVIDIA GPU, and torch finds none here. "
    "`python -m benchmarks.run --list` shows the cases without one."
)
TESTS = {
    "decode": "test_*decode*.py",
    "verify": "test_*decode*.py",
    "extend": "test_*extend*.py",
    "quantize": "test_*quantize*.py",
    "append": "test_*quantize*.py",
    "dequantize": "test_*quantize*.py",
}
"""Files of `tests/kernels` that must be green before an op is timed."""

_MOST_JOBS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Test, compile, measure, judge; 0 if every case selected gave its numbers."""
    parsed = _parser().parse_args(arguments)
    cases = selected(parsed.only)
    if not cases:
        print(f"no case matches {' or '.join(parsed.only)}; --list shows them all", file=sys.stderr)
        return 2
    if parsed.list:
        print(listing(cases))
        return 0

    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if not parsed.no_tests and not _tests_pass(cases, parsed.jobs):
        print("a test is red: no number is taken", file=sys.stderr)
        return 1

    import triton

    from benchmarks.gpu.session import Session, driver_version
    from benchmarks.gpu.timing import Stopwatch, measure_ceilings

    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "commit": parsed.commit or _commit(),
    }
    print(f"device    {facts['device']}, driver {driver_version()}")
    print(f"software  torch {facts['torch']}, triton {facts['triton']}, Python {platform.python_version()}")
    print(f"commit    {facts['commit']}")
    print(f"date      {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}", flush=True)
    _compile(cases, parsed)
    with torch.inference_mode():
        watch = Stopwatch(torch.device("cuda"))
        ceilings = measure_ceilings(watch)
        print(f"ceilings  {ceilings}\n", flush=True)
        remark = "tests not run" if parsed.no_tests else ""
        return _measure(cases, Session(watch, ceilings, facts, remark), parsed)


def listing(cases: Sequence[Case]) -> str:
    """Names of cases, what each is compared with, and the bars that speak of them."""
    names = {case.name for case in cases}
    lines = [f"{case.name:48} against {', '.join(case.against)}" for case in cases]
    lines += ["", "bars:"]
    for judgement in judged(()):
        bar = judgement.bar
        if names.intersection(case.name for case in bar.cases()):
            bound = "at most" if bar.measure == "median_us" else "at least"
            lines.append(f"  {bar.title}: {bar.measure} {bound} {bar.reach:.2f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="print cases and bars and stop")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="may be repeated")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="folder with one folder a peer")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FILE", help="JSON lines (default: %(default)s)"
    )
    parser.add_argument("--no-tests", action="store_true", help="skip the tests; rows say so")
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(_MOST_JOBS, os.cpu_count() or 1),
        help="processes that test and compile, half a gigabyte of GPU memory each (default: %(default)s)",
    )
    return parser


def _commit() -> str:
    try:
        return circumstances()["commit"]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _tests_pass(cases: Iterable[Case], jobs: int) -> bool:
    """Run the tests of the ops; a pattern without a file is as bad as a red test."""
    files = []
    for pattern in dict.fromkeys(TESTS[case.op] for case in cases):
        found = sorted((ROOT / "tests" / "kernels").glob(pattern))
        if not found:
            print(f"there is no tests/kernels/{pattern}", file=sys.stderr)
            return False
        files += [path for path in found if path not in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", *map(str, files)]
    if find_spec("xdist"):
        command += ["-n", str(jobs)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return not subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603


def _compile(cases: Sequence[Case], parsed: argparse.Namespace) -> None:
    """Fill Triton's cache from several processes, as one kernel after the other takes minutes."""
    from benchmarks.gpu.session import compile_case

    # one case of every kind first, so that processes do not compile the same kernels at the same time
    kinds = {(case.op, case.layout, case.q_heads): case.name for case in cases}
    names = list(dict.fromkeys([*kinds.values(), *(case.name for case in cases)]))
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(parsed.jobs, len(names)), mp_context=context) as pool,
        ThreadPoolExecutor(len(PEERS)) as others,
    ):
        if parsed.peers:
            others.map(lambda peer: _ask(peer, cases, parsed.peers, warm=True), PEERS)
        try:
            for name, problem in zip(names, pool.map(compile_case, names), strict=True):
                if problem:
                    print(f"compile   {name}: {problem}", flush=True)
        except BrokenProcessPool:
            print("compile   a process died; the run itself will say of which case", flush=True)
    print(f"compile   {len(names)} cases in {time.monotonic() - started:.0f} s", flush=True)


def _measure(cases: Sequence[Case], session: "Session", parsed: argparse.Namespace) -> int:
    """Every case, then the peers, then the verdict."""
    kept = read_rows(parsed.out) if parsed.only else []
    rows: list[Row] = []
    failed = []
    for number, case in enumerate(cases, 1):
        print(f"[{number:3}/{len(cases)}] {case.name:48} ", end="", flush=True)
        try:
            new = session.rows(case)
        except Exception as error:  # one case without a number must not cost the others theirs
            failed.append(case.name)
            print(f"NO NUMBER: {repr(error)[:300]}", flush=True)
            continue
        rows += new
        write_rows(merged(kept, rows), parsed.out)
        print(_line(new), flush=True)
    if parsed.peers:
        for row in _peer_rows(cases, session, parsed.peers):
            rows.append(row)
            write_rows(merged(kept, rows), parsed.out)
    print("\nbars, of this run:")
    for judgement in judged(rows):
        print(f"  {judgement}")
    print(f"\n{len(rows)} rows in {parsed.out}")
    if parsed.out != RESULTS:
        print(f"`python -m benchmarks.rows {parsed.out}` moves them into {RESULTS}")
    print("`python -m benchmarks.plot` and `python -m tests.project.readme_gpu` show them")
    if failed:
        print(f"no number of {len(failed)} cases: {', '.join(failed)}")
    return 1 if failed else 0


def _peer_rows(cases: Sequence[Case], session: "Session", folder: Path) -> Iterable[Row]:
    """What each peer says of the cases that are held against peers."""
    for peer in PEERS:
        print(f"peer {peer}", flush=True)
        answers = _ask(peer, cases, folder)
        for case in cases:
            for row in session.peer_rows(case, peer, answers) if "peers" in case.against else ():
                print(f"  {case.name:48} {_line([row])}; {row['note']}", flush=True)
                yield row


def _ask(peer: str, cases: Iterable[Case], folder: Path, *, warm: bool = False) -> dict[str, peers.Answer]:
    """A peer's answers at the shapes of the decode cases; those of all cases where none is selected."""
    held = [case for case in cases if "peers" in case.against]
    if not held:
        return {}
    decodes = [case for case in held if case.op == "decode"] or [
        case for case in selected([]) if case.op == "decode" and "peers" in case.against
    ]
    heads = decodes[0].q_heads, decodes[0].kv_heads, decodes[0].head_dim
    shapes = [f"{case.batch}x{case.context}" for case in decodes]
    return peers.ask(peer, folder, shapes, heads, warm=warm)


def _line(rows: Sequence[Row]) -> str:
    """Time and comparisons of one case."""
    first = rows[0]
    compared = ", ".join(
        f"{row['speedup']:.2f}x {row['baseline']}" if row["speedup"] else f"{row['baseline']} gave no time"
        for row in rows
    )
    reached = f"{first['gbps']:7.0f} GB/s {first['roofline']:6.1%} of roofline"
    return f"{first['median_us']:9.1f} us {reached}, {compared}"


if __name__ == "__main__":
    sys.exit(main())
