"""Dashboard and alerts ask for nothing that a server does not export, in words that their readers know."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from store.redis_process import RedisProcess
from store.running_server import running_server
from store.sample_blocks import keys_of, sample_blocks
from store.tenants_file import TenantsFile

from deploy.prometheus import ALERTS, Scrape, alert_names, scrape

DASHBOARD = ALERTS.parents[1] / "grafana" / "dashboard.json"
OF_PROMETHEUS = {"up", "ALERTS"}
LABELS_OF_PROMETHEUS = {"job", "instance", "alertname", "alertstate", "__name__"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return parsed


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    """What a server with all tiers, a tenants file and some work behind it shows."""
    folder = tmp_path_factory.mktemp("server")
    redis = RedisProcess(folder / "redis")
    tenants = TenantsFile(folder)
    tenants.add("search", bytes="1GiB", keys=1000)
    settings = {"redis_url": redis.url, "disk_path": folder / "disk", "disk_budget_bytes": 1 << 30}
    settings |= {"tenants_file": tenants.path}
    with (
        running_server(metrics_port=0, **settings) as server,
        tenants.client(server.address, "search") as client,
    ):
        blocks = sample_blocks(3)
        client.put(blocks)
        client.lookup(keys_of(blocks))
        list(client.get(keys_of(blocks)))
        yield scrape(server.metrics_url)
    redis.kill()


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """All questions that the dashboard and the alerts ask of Prometheus."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [variable["query"] for variable in dashboard["templating"]["list"][1:]]
    notes = [note["expr"] for note in dashboard["annotations"]["list"]]
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return panels + variables + notes + [rule["expr"] for rule in group["rules"]]


def test_every_metric_and_label_in_use_is_exported(dashboard: dict[str, Any], exported: Scrape) -> None:
    labels: dict[str, set[str]] = {}
    for name, pairs in exported.values:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    # a counter that has not counted shows its name and no sample yet
    known = labels.keys() | {f"{family}_total" for family in exported.families} | OF_PROMETHEUS
    asked = expressions(dashboard)
    assert len(asked) > 60
    for expression in asked:
        names = set(re.findall(r"\b(?:tq_store|process)_\w+|\bup\b|\bALERTS\b", expression))
        assert names, expression
        assert names <= known, expression
        for name, selectors in re.findall(r"(\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)\s*[!=]", selectors)) - LABELS_OF_PROMETHEUS
            assert used <= labels.get(name, used), expression


def test_every_metric_of_ours_is_on_the_dashboard(dashboard: dict[str, Any], exported: Scrape) -> None:
    text = json.dumps(dashboard)
    ours = {
        family for family in exported.families if family.startswith("tq_store_") and "_created" not in family
    }
    seen_elsewhere = {
        "tq_store_write_queue_blocks",  # its bytes are shown
        "tq_store_promotions",  # follow from hits below the top tier
        "tq_store_events",
        "tq_store_namespace_blocks",
        "tq_store_tenant_blocks",
        "tq_store_tenant_quota_blocks",
    }
    assert {family for family in ours if family not in text} == seen_elsewhere


def test_prometheus_can_parse_what_the_dashboard_asks(dashboard: dict[str, Any], tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions(dashboard))
        if not expression.startswith("label_values(")
    ]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    for rule_file in (file, ALERTS):
        done = subprocess.run(["promtool", "check", "rules", rule_file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_models_of_grafana_know_every_field(dashboard: dict[str, Any]) -> None:
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert lost("", dashboard, read) == []


def lost(path: str, written: Any, read: Any) -> list[str]:
    """Where something was written that did not come back."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [
            entry
            for key in written
            for entry in lost(f"{path}.{key}", written[key], read.get(key, "nothing"))
        ]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [
            entry
            for number, pair in enumerate(zip(written, read, strict=True))
            for entry in lost(f"{path}[{number}]", *pair)
        ]
    return [] if written == read else [path]


def test_panels_are_told_apart_explained_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", []))


def test_alerts_named_on_the_dashboard_exist(dashboard: dict[str, Any]) -> None:
    named = set(re.findall(r"TQStore[A-Z]\w+", json.dumps(dashboard)))
    assert named <= set(alert_names())
    assert len(named) > 10
