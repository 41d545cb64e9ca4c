"""OpenTelemetry spans, and the context that carries them over the wire; off unless asked for.

Where tracing is off nothing of opentelemetry is imported or called.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tq_store.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanKind, Tracer

Metadata = tuple[tuple[str, str], ...]
Attributes = Mapping[str, str | int | bool]

_SCOPE = "tq_store"


class Tracing:
    """Makes spans with one tracer. Safe to use from several threads.

    Args:
        tracer: By default that of the process, whose provider the engine sets up.

    Raises:
        ConfigError: opentelemetry is not installed.
    """

    def __init__(self, tracer: "Tracer | None" = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; run: pip install 'tq-store[otel]'") from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracer or trace.get_tracer(_SCOPE)

    @contextmanager
    def client_call(self, method: str) -> Iterator[Metadata]:
        """A span around a call, child of the caller's; gives the metadata that carry it to the server."""
        with self._span(method, self._trace.SpanKind.CLIENT) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier, self._trace.set_span_in_context(span))
            yield tuple(carrier.items())

    @contextmanager
    def server_call(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[None]:
        """A span around the serving of a call, child of the client's; current for what the call does."""
        carrier = {name: value for name, value in metadata or () if isinstance(value, str)}
        with (
            self._span(method, self._trace.SpanKind.SERVER, self._propagator.extract(carrier)) as span,
            self._trace.use_span(span, record_exception=False, set_status_on_exception=False),
        ):
            yield

    def describe(self, attributes: Attributes) -> None:
        """Add facts to the current span."""
        self._trace.get_current_span().set_attributes(attributes)

    @contextmanager
    def tier_call(self, tier: str, operation: str, num_keys: int) -> Iterator[None]:
        """A span around one call to a tier's medium, child of the span of the call that needs it."""
        attributes: Attributes = {"tq_store.tier": tier, "tq_store.num_keys": num_keys}
        with self._span(f"{tier} {operation}", self._trace.SpanKind.INTERNAL, None, attributes):
            yield

    @contextmanager
    def _span(
        self,
        name: str,
        kind: "SpanKind",
        context: "Context | None" = None,
        attributes: Attributes | None = None,
    ) -> Iterator["Span"]:
        """Begin and end a span without making it current: generators and threads may hold it."""
        span = self._tracer.start_span(name, context, kind=kind, attributes=attributes)
        try:
            yield span
        except Exception as error:
            span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end()
