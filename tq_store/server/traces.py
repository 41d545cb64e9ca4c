"""A server's own traces: where its spans go, and how they leave."""

from typing import TYPE_CHECKING

from tq_store.errors import ConfigError
from tq_store.rpc.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_EXPORT_TIMEOUT_S = 5


class ServerTraces:
    """Spans sent in batches to a collector, from a thread of their own; what it does not take is lost.

    Which traces are kept is the client's decision, or else that of ``OTEL_TRACES_SAMPLER``.
    ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` name the server.

    Args:
        endpoint: A collector's OTLP/gRPC address, ``http://host:4317``, or ``https://`` for TLS.
        version: The server's.

    Raises:
        ConfigError: opentelemetry is not installed.
    """

    def __init__(self, endpoint: str, *, version: str) -> None:
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; run: pip install 'tq-store[otel]'") from error
        named = Resource({"service.name": "tq-store", "service.version": version})
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(make_exporter(endpoint)))
        self.tracing = Tracing(self._provider.get_tracer("tq_store", version))

    def close(self) -> None:
        """Send what waits; takes no longer than a few seconds, though the collector be gone."""
        self._provider.shutdown()


def make_exporter(endpoint: str) -> "SpanExporter":
    """What sends spans to an endpoint."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
