"""What Prometheus makes of a server: scrapes, and the alerts that fire when what happened goes on."""

import json
import math
import subprocess
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families
from store.running_server import WAIT_S

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml"
_MINUTES = 180
_TARGET = (("instance", "drill:9464"), ("job", "tq-store"))

Sample = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Scrape:
    """What a server showed at one moment; nothing if it did not answer."""

    families: frozenset[str] = frozenset()
    values: Mapping[Sample, float] = field(default_factory=dict)
    gauges: frozenset[Sample] = frozenset()


def scrape(url: str | None) -> Scrape:
    assert url is not None
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            text = answer.read().decode()
    except OSError:
        return Scrape()
    values: dict[Sample, float] = {}
    gauges, families = set(), set()
    for family in text_string_to_metric_families(text):
        families.add(family.name)
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            values[key] = sample.value
            if family.type == "gauge":
                gauges.add(key)
    return Scrape(families=frozenset(families), values=values, gauges=frozenset(gauges))


def series(before: Scrape, after: Scrape) -> dict[str, str]:
    """Three hours, of which each minute is like the time between two scrapes, in promtool's notation."""
    lines = {_selector("up", ()): f"{int(bool(after.values))}+0x{_MINUTES}"}
    for key, value in after.values.items():
        start = value if key in after.gauges else before.values.get(key, 0.0)
        if not math.isnan(value):
            lines[_selector(*key)] = f"{start!r}+{value - start!r}x{_MINUTES}"
    return lines


def alert_names() -> list[str]:
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule["alert"] for rule in group["rules"]]


def check(
    directory: Path, lines: Mapping[str, str], *, firing: Collection[str], maybe: Collection[str] = ()
) -> None:
    """See that these alerts fire on the series, and no others but perhaps those in `maybe`."""
    quiet = [name for name in alert_names() if name not in {*firing, *maybe}]
    expected = [
        _expectation(f'group by (alertname) (ALERTS{{alertname="{name}", alertstate="firing"}})', name)
        for name in firing
    ]
    others = "|".join(quiet)
    expected.append(
        _expectation(f'group by (alertname) (ALERTS{{alertname=~"{others}", alertstate="firing"}})')
    )
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in lines.items()],
                "promql_expr_test": expected,
            }
        ],
    }
    file = directory / "alerts_test.json"  # JSON is YAML
    file.write_text(json.dumps(test))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def _expectation(expression: str, *names: str) -> dict[str, object]:
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names]
    return {"expr": expression, "eval_time": f"{_MINUTES - 10}m", "exp_samples": samples}


def _selector(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    inside = ", ".join(f"{label}={json.dumps(value)}" for label, value in (*labels, *_TARGET))
    return f"{name}{{{inside}}}"
