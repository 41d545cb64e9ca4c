"""Runs `faults.replica` and adds what it counted to the result of a scenario."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from faults import replica
from faults.trial import Result

_TESTS = str(Path(__file__).parent.parent)
_LONGEST_END_S = 60


def child_environment(**more: str) -> dict[str, str]:
    """In which a child finds the modules that this process finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([_TESTS, *filter(None, sys.path)])} | more


class ReplicaProcess:
    """An engine at work, from when this is made until `finish`."""

    def __init__(
        self, address: str, result: Result, *, seed: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._result = result
        self._process = subprocess.Popen(
            [sys.executable, "-m", replica.__name__, address, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment or child_environment(),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the replica did not start"

    def finish(self) -> None:
        """End it and add its counts; at the end, its store must have had a whole document for it."""
        try:
            output, _ = self._process.communicate(timeout=_LONGEST_END_S)
            counts = json.loads(output.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            self.kill()
            self._result.failed_request(f"an engine did not end: {error!r}")
            return
        at_end = counts.pop("at_end")
        self._result.expect(at_end == replica.PAGES, f"an engine's last request found {at_end} pages")
        for name, times in counts.items():
            self._result.count(name, times)

    def kill(self) -> None:
        """End it if it has not ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
