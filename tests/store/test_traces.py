"""Traces from the engine over the wire to the tier, and what they cost when they are off."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import keys_of, sample_blocks, sample_key
from store.tenants_file import TenantsFile

from tq_store.client import StoreClient
from tq_store.config import ClientConfig, ServerConfig
from tq_store.errors import ConfigError, RpcError
from tq_store.rpc import tracing as tracing_module
from tq_store.server import traces as traces_module
from tq_store.server.traces import ServerTraces

TRACED = ClientConfig(trace=True, max_attempts=1)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The engine's own provider, which it would have set for its process, and what it exports."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What the server exports; complete once it has stopped."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(traces_module, "make_exporter", lambda _: exporter)
    return exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    spans: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    return spans


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    assert child.context is not None
    assert parent.context is not None
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )


def test_one_trace_leads_from_the_engine_to_the_tier(
    engine: InMemorySpanExporter, collected: InMemorySpanExporter, tmp_path: Path
) -> None:
    blocks = sample_blocks(3)
    disk = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 20}
    with running_server(**disk) as server, StoreClient(server.address) as untraced:
        untraced.put(blocks)
    with (
        running_server(**disk, trace_endpoint="http://unused") as server,
        StoreClient(server.address, config=TRACED) as client,
        trace.get_tracer("engine").start_as_current_span("prefill"),
    ):
        assert client.lookup(keys_of(blocks)) == 3
        assert [block for _, block in client.get(keys_of(blocks))] == [block for _, block in blocks]
    (prefill,) = by_name(engine)["prefill"]
    spans = by_name(collected)
    for method in ("Lookup", "OpenPipe", "GetPiped"):
        (sent,), (served,) = by_name(engine)[method], spans[method]
        assert (sent.kind, served.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
        assert is_child(sent, prefill)
        assert is_child(served, sent)
    (served,) = spans["GetPiped"]
    for name in ("memory get", "disk get", "memory put"):
        assert all(is_child(span, served) for span in spans[name])
    assert served.attributes is not None
    assert dict(served.attributes) == {
        "rpc.grpc.status_code": 0,
        "tq_store.tenant": "",
        "tq_store.num_keys": 3,
        "tq_store.num_bytes": 3 * 512,
    }
    assert {(span.attributes or {})["tq_store.tier"] for span in spans["disk get"]} == {"disk"}
    assert served.resource.attributes["service.name"] == "tq-store"


def test_what_is_written_later_belongs_to_no_call(
    engine: InMemorySpanExporter, collected: InMemorySpanExporter, tmp_path: Path
) -> None:
    disk = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 20}
    with (
        running_server(**disk, trace_endpoint="http://unused") as server,
        StoreClient(server.address, config=TRACED) as client,
    ):
        client.put(sample_blocks(2))
    spans = by_name(collected)
    (served,), (sent,) = spans["Put"], by_name(engine)["Put"]
    assert is_child(served, sent)
    assert all(is_child(span, served) for span in spans["memory put"])
    assert spans["disk put"]
    assert all(span.parent is None for span in spans["disk put"])


def test_a_failed_call_is_marked_on_both_sides(
    engine: InMemorySpanExporter, collected: InMemorySpanExporter
) -> None:
    with (
        running_server(trace_endpoint="http://unused") as server,
        StoreClient(server.address, config=TRACED) as client,
        pytest.raises(RpcError),
    ):
        client.lookup([b"short"])
    for exporter in (engine, collected):
        (span,) = by_name(exporter)["Lookup"]
        assert span.status.status_code is StatusCode.ERROR
    (served,) = by_name(collected)["Lookup"]
    assert (served.attributes or {})["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_a_reader_that_stops_early_ends_its_span(engine: InMemorySpanExporter) -> None:
    with running_server() as server, StoreClient(server.address, config=TRACED) as client:
        client.put(sample_blocks(3))
        blocks = client.get([sample_key(number) for number in range(3)])
        next(blocks)
        blocks.close()  # type: ignore[attr-defined]
        assert [span.status.status_code for span in by_name(engine)["GetPiped"]] == [StatusCode.UNSET]


def test_a_server_without_traces_serves_clients_with_them(engine: InMemorySpanExporter) -> None:
    with running_server() as server, StoreClient(server.address, config=TRACED) as client:
        assert client.lookup([sample_key(1)]) == 0
    assert len(by_name(engine)["Lookup"]) == 1


def test_tenants_are_named_and_secrets_are_not(
    collected: InMemorySpanExporter, engine: InMemorySpanExporter, tmp_path: Path
) -> None:
    file = TenantsFile(tmp_path)
    token = file.add("search")
    with (
        running_server(tenants_file=file.path, trace_endpoint="http://unused") as server,
        file.client(server.address, "search") as client,
    ):
        client.lookup([sample_key(1)])
    (served,) = by_name(collected)["Lookup"]
    assert (served.attributes or {})["tq_store.tenant"] == "search"
    shown = "".join(span.to_json() for span in collected.get_finished_spans())
    assert token not in shown
    assert sample_key(1).hex() not in shown


def test_traces_reach_a_collector() -> None:
    received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(
            self, request: trace_service_pb2.ExportTraceServiceRequest, _: object
        ) -> trace_service_pb2.ExportTraceServiceResponse:
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    try:
        with (
            running_server(trace_endpoint=f"http://127.0.0.1:{port}") as server,
            StoreClient(server.address) as client,
        ):
            client.lookup([sample_key(1)])
        wait_until(lambda: bool(received))
    finally:
        collector.stop(None).wait(WAIT_S)
    names = [
        span.name
        for request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert "Lookup" in names
    assert "memory contains" in names


def test_a_collector_that_is_gone_costs_no_call() -> None:
    with (
        running_server(trace_endpoint="http://127.0.0.1:1") as server,
        StoreClient(server.address) as client,
    ):
        assert client.lookup([sample_key(1)]) == 0


def test_without_the_extra_who_asks_for_traces_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("opentelemetry", "opentelemetry.sdk.resources"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'tq-store\[otel\]'"):
        StoreClient(config=TRACED)
    with pytest.raises(ConfigError, match=r"pip install 'tq-store\[otel\]'"):
        ServerTraces("http://unused", version="1")


def test_nothing_of_it_is_called_or_imported_when_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(tracing_module.Tracing, "__init__", fail)
    assert (ServerConfig().trace_endpoint, ClientConfig().trace) == (None, False)
    with running_server() as server, StoreClient(server.address) as client:
        client.put(sample_blocks(1))
        assert client.lookup([sample_key(0)]) == 1
