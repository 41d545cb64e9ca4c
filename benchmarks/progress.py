"""Progress: lines that say how far a benchmark has come, so that a run that was killed tells it as well."""

import time


class Progress:
    """A clock that starts when it is made.

    Args:
        name: What begins every line.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.perf_counter()

    def say(self, what: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{self._name} at {time.perf_counter() - self._started:.1f} s: {what}", flush=True)
