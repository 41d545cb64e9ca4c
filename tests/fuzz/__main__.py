"""Feed every parser, and a running server, what nobody should send them.

::

    python -m fuzz --seconds 60 --only frames service

from the folder `tests`. The time is shared between the targets. A finding ends the run with status 1 and a
traceback; it names the seed, and holds the input.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from fuzz.driver import fuzz
from fuzz.targets import TARGETS, quiet


def main() -> int:
    """Fuzz for a time and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the parsers and the service.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("inputs", nargs="*", type=Path, help="feed these files to one target instead")
    options = parser.parse_args()
    quiet()
    if options.inputs:
        with TARGETS[options.only[0]].opened() as feed:
            for path in options.inputs:
                print(path, *feed(path.read_bytes()))
        return 0
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    print(f"seed {seed}")
    for name in options.only:
        until = time.monotonic() + options.seconds / len(options.only)
        seen = fuzz(TARGETS[name], seed=seed, keep_going=lambda _, until=until: time.monotonic() < until)
        print(f"{name}:", ", ".join(f"{times} {what}" for what, times in seen.most_common()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
