"""What one scenario gets, and the counts of all of them: what was done to the store and what came of it."""

import json
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

DONE = ("kills", "flips", "truncations", "stalls")
BROKEN = ("served_wrong", "lost_acked", "failed_requests")


class Result:
    """Counts from any thread.

    Of the broken promises, ``served_wrong`` are blocks whose bytes were not those that were put,
    ``lost_acked`` blocks that the disk tier had acknowledged and no longer has, and ``failed_requests``
    everything else that must not happen: an exception that reaches an engine, a call far over its deadline, a
    promise of the scenario that did not hold.
    """

    def __init__(self) -> None:
        self._counts = Counter(dict.fromkeys((*DONE, *BROKEN), 0))
        self._lock = threading.Lock()

    def count(self, what: str, times: int = 1) -> None:
        """Something done or seen; names beyond those of the final line show in the progress alone."""
        with self._lock:
            self._counts[what] += times

    def served_wrong(self, what: str) -> None:
        self._broken("served_wrong", what)

    def lost_acked(self, what: str) -> None:
        self._broken("lost_acked", what)

    def failed_request(self, what: str) -> None:
        self._broken("failed_requests", what)

    def expect(self, is_so: bool, what: str) -> None:
        """A promise; where it does not hold, a request counts as failed."""
        if not is_so:
            self.failed_request(what)

    @property
    def counts(self) -> Counter[str]:
        with self._lock:
            return self._counts.copy()

    @property
    def is_clean(self) -> bool:
        return not any(self.counts[name] for name in BROKEN)

    def line(self, *, seconds: float, seed: int) -> str:
        """The last line of a run."""
        counts = self.counts
        known = {name: counts[name] for name in (*DONE, *BROKEN)}
        return json.dumps(known | {"seconds": round(seconds, 1), "seed": seed})

    def _broken(self, name: str, what: str) -> None:
        self.count(name)
        sys.stderr.write(f"  {name}: {what}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of a scenario.

    Args:
        rng: All that is random comes from it.
        directory: Empty, the scenario's own.
        result: Where to count.
        scale: Size of the run; 1 in `make test-faults`, less in `make test`.
    """

    rng: random.Random
    directory: Path
    result: Result
    scale: float

    def times(self, full: int, least: int = 1) -> int:
        """How often to do what a full run does so many times."""
        return max(least, round(full * self.scale))
