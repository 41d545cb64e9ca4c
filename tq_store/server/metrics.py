"""What a server counts while it works: calls, bytes, tiers and tenants, in a registry of its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from tq_store.server import metric_table as table
from tq_store.server.metric_table import Definition, Type


class Metrics:
    """The metrics of one server. Safe to use from any thread.

    Args:
        methods: Method names that may become labels; every other name is counted as ``other``.
    """

    def __init__(self, methods: frozenset[str]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        self._methods = methods
        self._tenants: set[str] = set()
        self._requests = _counter(table.REQUESTS, self.registry)
        self._request_seconds = _histogram(table.REQUEST_SECONDS, self.registry)
        self._active = _gauge(table.ACTIVE_REQUESTS, self.registry)
        self._max_active = _gauge(table.MAX_REQUESTS, self.registry)
        self._inflight = _gauge(table.INFLIGHT_BYTES, self.registry)
        self._max_inflight = _gauge(table.MAX_INFLIGHT_BYTES, self.registry)
        self._outflight = _gauge(table.OUTFLIGHT_BYTES, self.registry)
        self._max_outflight = _gauge(table.MAX_OUTFLIGHT_BYTES, self.registry)
        self._received = _counter(table.RECEIVED_BYTES, self.registry)
        self._sent = _counter(table.SENT_BYTES, self.registry)
        self._saved = _counter(table.SAVED_BYTES, self.registry)
        self._lookup_keys = _counter(table.LOOKUP_KEYS, self.registry)
        self._tier_seconds = _histogram(table.TIER_SECONDS, self.registry)
        self._tenant_requests = _counter(table.TENANT_REQUESTS, self.registry)
        self._tenant_hits = _counter(table.TENANT_HITS, self.registry)
        self._tenant_misses = _counter(table.TENANT_MISSES, self.registry)
        self._tenant_read = _counter(table.TENANT_READ_BYTES, self.registry)
        self._tenant_written = _counter(table.TENANT_WRITTEN_BYTES, self.registry)
        self._tenant_limited = _counter(table.TENANT_LIMITED, self.registry)
        self._tenant_evicted = _counter(table.TENANT_EVICTED_BLOCKS, self.registry)
        self._denied = _counter(table.DENIED, self.registry)
        self._reloads = _counter(table.CREDENTIAL_RELOADS, self.registry)
        self._audit_dropped = _counter(table.AUDIT_DROPPED, self.registry)

    def limits(self, *, max_requests: int, max_inflight_bytes: int, max_outflight_bytes: int) -> None:
        """What the server allows, to set the gauges beside it in proportion."""
        self._max_active.set(max_requests)
        self._max_inflight.set(max_inflight_bytes)
        self._max_outflight.set(max_outflight_bytes)

    def started(self) -> None:
        """A call began."""
        self._active.inc()

    def finished(self, method: str, status: str, elapsed_s: float, *, tenant: str = "") -> None:
        """A call that began has ended."""
        self._active.dec()
        self._requests.labels(method, status).inc()
        self._request_seconds.labels(method).observe(elapsed_s)
        if tenant:
            self._tenant_requests.labels(self.tenant_label(tenant), status).inc()

    def denied(self, method_path: str) -> None:
        """A call without a valid token was turned away before it began."""
        method = method_path.rpartition("/")[2]
        label = method if method in self._methods else table.OTHER
        self._requests.labels(label, "UNAUTHENTICATED").inc()
        self._denied.labels("unauthenticated").inc()

    def forbidden(self) -> None:
        """A caller asked for what it is not permitted."""
        self._denied.labels("not_permitted").inc()

    def received(self, num_bytes: int) -> None:
        """A part of a block arrived."""
        self._received.inc(num_bytes)

    def sent(self, num_bytes: int) -> None:
        """A part of a block left."""
        self._sent.inc(num_bytes)

    def inflight(self, num_bytes: int) -> None:
        """So many bytes are being received now."""
        self._inflight.set(num_bytes)

    def outflight(self, num_bytes: int) -> None:
        """So many bytes are read for gets or being sent now."""
        self._outflight.set(num_bytes)

    def looked_up(self, num_keys: int, num_hits: int) -> None:
        """A lookup was answered."""
        self._lookup_keys.labels("hit").inc(num_hits)
        self._lookup_keys.labels("miss").inc(num_keys - num_hits)

    def got(self, tenant: str, *, num_hits: int, num_misses: int, num_bytes: int, saved_bytes: int) -> None:
        """A get found blocks, or did not."""
        self._saved.labels("got").inc(max(0, saved_bytes))
        if tenant:
            label = self.tenant_label(tenant)
            self._tenant_hits.labels(label).inc(num_hits)
            self._tenant_misses.labels(label).inc(num_misses)
            self._tenant_read.labels(label).inc(num_bytes)

    def put(self, tenant: str, *, num_bytes: int, saved_bytes: int) -> None:
        """A put stored blocks."""
        self._saved.labels("put").inc(max(0, saved_bytes))
        if tenant:
            self._tenant_written.labels(self.tenant_label(tenant)).inc(num_bytes)

    def limited(self, tenant: str, limit: str) -> None:
        """A limit of a tenant (``bytes``, ``keys``, ``rate`` or ``calls``) refused a call."""
        self._tenant_limited.labels(self.tenant_label(tenant), limit).inc()

    def evicted(self, tenant: str, num_blocks: int) -> None:
        """Blocks were removed to make room in a tenant's quota."""
        self._tenant_evicted.labels(self.tenant_label(tenant)).inc(num_blocks)

    def reloaded(self, result: str) -> None:
        """A file of credentials was read again, ``ok`` or ``failed``."""
        self._reloads.labels(result).inc()

    def audit_dropped(self) -> None:
        """A record of the audit log was lost."""
        self._audit_dropped.inc()

    @contextmanager
    def watch_tier(self, tier: str, operation: str, num_keys: int) -> Iterator[None]:
        """Time one call to a tier's medium."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._tier_seconds.labels(tier, operation).observe(time.perf_counter() - started)

    def tenant_label(self, tenant: str) -> str:
        """The label of a tenant: its name, or ``other`` once there are too many."""
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= table.MAX_TENANT_LABELS:
            return table.OTHER
        self._tenants.add(tenant)
        return tenant


def _described(definition: Definition, expected: Type, registry: CollectorRegistry) -> dict[str, Any]:
    assert definition.type is expected, definition.name
    return {
        "name": definition.name,
        "documentation": definition.meaning,
        "labelnames": definition.labels,
        "registry": registry,
    }


def _counter(definition: Definition, registry: CollectorRegistry) -> Counter:
    return Counter(**_described(definition, Type.COUNTER, registry))


def _gauge(definition: Definition, registry: CollectorRegistry) -> Gauge:
    return Gauge(**_described(definition, Type.GAUGE, registry))


def _histogram(definition: Definition, registry: CollectorRegistry) -> Histogram:
    return Histogram(**_described(definition, Type.HISTOGRAM, registry), buckets=table.SECONDS_BUCKETS)
