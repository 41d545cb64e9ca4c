"""Every scenario in a small size, and the counts that a run ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.__main__ import run_scenario
from faults.scenarios import SCENARIOS
from faults.trial import BROKEN, DONE, Result, Trial

SCALE = 0.03


@pytest.mark.redis
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_wrong_is_served_nothing_lost_and_no_request_fails(name: str) -> None:
    result = Result()
    run_scenario(name, result, seed=5, scale=SCALE)
    assert result.is_clean, result.counts
    assert sum(result.counts.values()) > 0, "a scenario that does nothing finds nothing"


def test_a_scenario_that_cannot_go_on_is_a_failed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trial: Trial) -> None:
        raise OSError("no such luck")

    monkeypatch.setitem(SCENARIOS, "broken", broken)
    result = Result()
    run_scenario("broken", result, seed=5, scale=SCALE)
    assert not result.is_clean
    assert result.counts["failed_requests"] == 1


@pytest.mark.parametrize("what", BROKEN)
def test_every_broken_promise_counts(what: str) -> None:
    result = Result()
    assert result.is_clean
    {"served_wrong": result.served_wrong, "lost_acked": result.lost_acked}.get(what, result.failed_request)(
        "x"
    )
    assert not result.is_clean
    assert json.loads(result.line(seconds=1, seed=2))[what] == 1


def test_the_last_line_is_one_object_of_counts() -> None:
    command = [sys.executable, "-m", "faults", "--only", "flips", "--scale", "0.01", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert list(counts) == [*DONE, *BROKEN, "seconds", "seed"]
    assert (done.returncode, counts["seed"]) == (0, 3), done.stderr
