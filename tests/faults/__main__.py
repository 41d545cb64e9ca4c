"""Every fault, injected for real; the last line of the output is one JSON object of counts.

::

    python -m faults --seed 7 --minutes 30 --only kills sockets

from the folder `tests`. Each round runs every scenario once; `--minutes` adds rounds with other seeds until
the time is over. The exit status is 1 if a wrong byte was served, an acknowledged block lost or a request of
an engine failed.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from faults.scenarios import SCENARIOS
from faults.trial import Result, Trial


def run_scenario(name: str, result: Result, *, seed: int | str, scale: float) -> None:
    """Run one scenario; if it cannot go on, that is a failed request as well."""
    before, started = result.counts, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tq-faults-", ignore_cleanup_errors=True) as directory:
        trial = Trial(
            rng=random.Random(f"{seed} {name}"), directory=Path(directory), result=result, scale=scale
        )
        try:
            SCENARIOS[name](trial)
        except Exception:
            traceback.print_exc()
            result.failed_request(f"{name} ended early")
    counts = {what: times - before[what] for what, times in result.counts.items() if times > before[what]}
    seen = ", ".join(f"{times} {what.replace('_', ' ')}" for what, times in counts.items())
    sys.stderr.write(f"{name:<16} {time.monotonic() - started:6.1f} s   {seen}\n")
    sys.stderr.flush()


def main() -> int:
    """Run rounds and print the counts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="Inject faults, count what breaks.")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long; default: one round")
    parser.add_argument("--scale", type=float, default=1.0, help="size of a round; 1 is a full one")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    options = parser.parse_args()
    # warnings are what a store says of each fault; an error is something that nobody foresaw
    logging.basicConfig(level=logging.ERROR)
    result, started = Result(), time.monotonic()
    rounds = 0
    while not rounds or time.monotonic() - started < 60 * options.minutes:
        seed = options.seed if not rounds else f"{options.seed}.{rounds}"
        sys.stderr.write(f"round {rounds + 1}, seed {seed}\n")
        for name in options.only:
            run_scenario(name, result, seed=seed, scale=options.scale)
        rounds += 1
    print(result.line(seconds=time.monotonic() - started, seed=options.seed), flush=True)
    return 0 if result.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
