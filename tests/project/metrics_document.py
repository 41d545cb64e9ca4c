"""`deploy/METRICS.md`, made from the definitions; `python -m tests.project.metrics_document` rewrites it."""

from pathlib import Path

from tq_store.server.metric_table import DEFINITIONS, MAX_TENANT_LABELS

DOCUMENT = Path(__file__).parents[2] / "deploy" / "METRICS.md"
_HEAD = f"""\
# Metrics

What `--metrics-port` shows, one row a metric. This file is made from `tq_store/server/metric_table.py` by `python -m tests.project.metrics_document`, and a test compares it with a server's real scrape. Beside these come Prometheus' own `process_…` metrics (memory, processor time, open files) of the server process.

Counters start at 0 with the process. A histogram has the samples `…_bucket`, `…_sum` and `…_count`. `tenant` is a name from the tenants file; beyond {MAX_TENANT_LABELS} tenants the rest share the label `other`. Without a tenants file the tenant metrics are empty.

| metric | type | labels | meaning |
|---|---|---|---|
"""  # noqa: E501 - prose


def document() -> str:
    """The whole file."""
    rows = [
        f"| `{metric.name}` | {metric.type.value} "
        f"| {', '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |\n"
        for metric in DEFINITIONS
    ]
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
