"""`deploy/METRICS.md`, made from the definitions; `python -m tests.project.metrics_document` rewrites it."""

from pathlib import Path

from tq_store.server.metric_table import DEFINITIONS, MAX_TENANT_LABELS

DOCUMENT = Path(__file__).parents[2] / "deploy" / "METRICS.md"
_HEAD = f"""\
# Metrics, traces, logs

## Metrics

What `--metrics-port` shows, one row a metric. This file is made from `tq_store/server/metric_table.py` by `python -m tests.project.metrics_document`, and a test compares it with a server's real scrape. Beside these come Prometheus' own `process_…` metrics (memory, processor time, open files) of the server process.

Counters start at 0 with the process. A histogram has the samples `…_bucket`, `…_sum` and `…_count`. `tenant` is a name from the tenants file; beyond {MAX_TENANT_LABELS} tenants the rest share the label `other`. Without a tenants file the tenant metrics are empty.

| metric | type | labels | meaning |
|---|---|---|---|
"""  # noqa: E501 - prose

_TAIL = """
## Traces

`pip install "tq-store[server,otel]"`, then `--trace-endpoint http://collector:4317` sends OpenTelemetry spans by OTLP over gRPC (`https://` for TLS). Which traces are kept is the caller's decision, or else that of `OTEL_TRACES_SAMPLER`; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` name the server. Spans leave in batches; a collector that is gone costs no call, only its spans.

A client with `trace = true` makes its spans with the process's own provider, so that they hang below whatever span the engine has open, and the server's hang below them:

    prefill                        the engine's own
    └── Get                        client: how long the engine waited
        └── Get                    server: `tq_store.tenant`, `tq_store.num_keys`, `tq_store.num_bytes`, `rpc.grpc.status_code`
            ├── memory get         one span for each call to a tier's medium: `tq_store.tier`, `tq_store.num_keys`
            ├── disk get
            └── memory put         what was found below is copied up

What is written to a lower tier later belongs to no call and is a trace of its own. No span holds a token, a key or a block. Off, which is the default, nothing of OpenTelemetry is imported.

## Logs

To stderr, as text or with `--log-format json` as one object a line: `time` (UTC), `level`, `logger`, `message`, and `exception` with its traceback. Nothing is logged for a block or a call that went well; outages of tiers are logged when they begin and when they end. The audit log is another file: [SECURITY.md](SECURITY.md#the-audit-log).
"""  # noqa: E501 - prose


def document() -> str:
    """The whole file."""
    rows = [
        f"| `{metric.name}` | {metric.type.value} "
        f"| {', '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |\n"
        for metric in DEFINITIONS
    ]
    return _HEAD + "".join(rows) + _TAIL


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
