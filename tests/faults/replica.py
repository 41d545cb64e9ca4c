"""An engine in a process of its own: `python -m faults.replica ADDRESS SEED` works until its input ends.

Documents are shared with whoever uses the same store. At its end it asks for one document until all of that
comes from the store. The last line of the output is a JSON object of counts.
"""

import json
import logging
import random
import select
import sys
import time

from faults.engine import engine, prompt
from faults.trial import Result
from faults.workload import STEADY

DOCUMENTS = 6
PAGES = 8
_LONGEST_RETURN_S = 30


def main(address: str, seed: int) -> None:
    rng, result, loaded = random.Random(seed), Result(), 0
    with engine(address, result, STEADY) as own:
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0.002)[0]:
            loaded += own.request(prompt(rng.randrange(DOCUMENTS), rng.randint(1, PAGES)))
        at_end, until = 0, time.monotonic() + _LONGEST_RETURN_S
        while at_end < PAGES and time.monotonic() < until:
            at_end = own.request(prompt(0, PAGES))
            own.flush()
    print(json.dumps(result.counts | {"loaded_pages": loaded, "at_end": at_end}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    main(sys.argv[1], int(sys.argv[2]))
