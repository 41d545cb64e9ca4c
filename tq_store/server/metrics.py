"""Prometheus metrics: one table of definitions, and the HTTP endpoint that shows them."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tq_store.errors import ConfigError
from tq_store.results import NamespaceUsage, largest_namespaces
from tq_store.rpc.convert import ServerStats

logger = logging.getLogger(__name__)

OTHER_METHOD = "other"
_SECONDS_BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
    30.0,
    120.0,
)
_SCRAPE_TIMEOUT_S = 2.0
_MAX_NAMESPACES = 32
OTHER_NAMESPACES = "other"
"""Label of all namespaces of a tier but the largest."""

COUNTERS = {
    "requests": ("tq_store_requests_total", "Calls by method and gRPC status.", ("method", "status")),
    "received": ("tq_store_received_bytes_total", "Block bytes received in puts.", ()),
    "sent": ("tq_store_sent_bytes_total", "Block bytes sent in gets.", ()),
}
HISTOGRAMS = {
    "seconds": ("tq_store_request_seconds", "Time from the start of a call to its end.", ("method",)),
}
GAUGES = {
    "active": ("tq_store_active_requests", "Calls in flight.", ()),
    "inflight": ("tq_store_inflight_bytes", "Declared bytes of blocks being received.", ()),
}
STORE_GAUGES = {
    "num_blocks": ("tq_store_tier_blocks", "Blocks in a tier."),
    "used_bytes": ("tq_store_tier_used_bytes", "Bytes of the blocks in a tier."),
    "budget_bytes": ("tq_store_tier_budget_bytes", "Limit of a tier that keeps one."),
}
STORE_COUNTERS = {
    "evicted_blocks": ("tq_store_tier_evicted_blocks_total", "Blocks that a tier dropped to make room."),
}
NAMESPACE_GAUGES = {
    "num_blocks": ("tq_store_namespace_blocks", "Blocks of a namespace in a tier, as last counted."),
    "used_bytes": ("tq_store_namespace_used_bytes", "Bytes of those blocks."),
}
SHARD_GAUGES = {
    "is_open": ("tq_store_shard_open", "1 while a server of a tier is left alone because it failed."),
}
SHARD_COUNTERS = {
    "failed_calls": ("tq_store_shard_failed_calls_total", "Calls that a server of a tier did not answer."),
    "lost_keys": ("tq_store_shard_lost_keys_total", "Misses and refused blocks for want of that server."),
}
STORE_EVENTS = ("tq_store_events_total", "Events counted by the store, by name.", ("event",))
BUILD_INFO = ("tq_store_build_info", "Always 1; the label says which version runs.", ("version",))


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        methods: Method names that may become labels; every other name is counted as ``other``.
    """

    def __init__(self, methods: frozenset[str]) -> None:
        self.registry = CollectorRegistry()
        self._methods = methods
        self._counters = {key: Counter(*spec, registry=self.registry) for key, spec in COUNTERS.items()}
        self._seconds = Histogram(*HISTOGRAMS["seconds"], buckets=_SECONDS_BUCKETS, registry=self.registry)
        self._gauges = {key: Gauge(*spec, registry=self.registry) for key, spec in GAUGES.items()}

    def started(self) -> None:
        """A call began."""
        self._gauges["active"].inc()

    def finished(self, method: str, status: str, elapsed_s: float) -> None:
        """A call that began has ended."""
        self._gauges["active"].dec()
        self._counters["requests"].labels(method, status).inc()
        self._seconds.labels(method).observe(elapsed_s)

    def denied(self, method_path: str) -> None:
        """A call was turned away before it began."""
        method = method_path.rpartition("/")[2]
        label = method if method in self._methods else OTHER_METHOD
        self._counters["requests"].labels(label, "UNAUTHENTICATED").inc()

    def received(self, num_bytes: int) -> None:
        """A block arrived."""
        self._counters["received"].inc(num_bytes)

    def sent(self, num_bytes: int) -> None:
        """A block left."""
        self._counters["sent"].inc(num_bytes)

    def inflight(self, num_bytes: int) -> None:
        """So many bytes are being received now."""
        self._gauges["inflight"].set(num_bytes)


class StoreCollector(Collector):
    """Asks the store for its statistics whenever somebody scrapes.

    Called from the HTTP server's threads; the question runs on the server's event loop. A store that does not
    answer in two seconds is left out of the scrape, so that the rest is still seen.
    """

    def __init__(
        self, read_stats: Callable[[], Coroutine[Any, Any, ServerStats]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._read_stats = read_stats
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        """The store's metrics at this moment."""
        reading = asyncio.run_coroutine_threadsafe(self._read_stats(), self._loop)
        try:
            stats = reading.result(_SCRAPE_TIMEOUT_S)
        except TimeoutError:
            reading.cancel()
            logger.warning("the store did not tell its statistics within %s s", _SCRAPE_TIMEOUT_S)
            return
        yield from _families(stats)


def _families(stats: ServerStats) -> Iterator[Metric]:
    events = CounterMetricFamily(STORE_EVENTS[0], STORE_EVENTS[1], labels=STORE_EVENTS[2])
    for event, value in stats.counters.items():
        events.add_metric((event,), value)
    yield events
    for attribute, (name, text) in STORE_GAUGES.items():
        yield _tier_family(GaugeMetricFamily(name, text, labels=("tier",)), attribute, stats)
    for attribute, (name, text) in STORE_COUNTERS.items():
        yield _tier_family(CounterMetricFamily(name, text, labels=("tier",)), attribute, stats)
    for attribute, (name, text) in NAMESPACE_GAUGES.items():
        yield _namespace_family(GaugeMetricFamily(name, text, labels=("tier", "namespace")), attribute, stats)
    for attribute, (name, text) in SHARD_GAUGES.items():
        yield _shard_family(GaugeMetricFamily(name, text, labels=("tier", "shard")), attribute, stats)
    for attribute, (name, text) in SHARD_COUNTERS.items():
        yield _shard_family(CounterMetricFamily(name, text, labels=("tier", "shard")), attribute, stats)
    build = GaugeMetricFamily(BUILD_INFO[0], BUILD_INFO[1], labels=BUILD_INFO[2])
    build.add_metric((stats.version,), 1)
    yield build


def _tier_family(
    family: GaugeMetricFamily | CounterMetricFamily, attribute: str, stats: ServerStats
) -> Metric:
    for tier, tier_stats in stats.tiers.items():
        value = getattr(tier_stats, attribute)
        if value is not None:
            family.add_metric((tier,), value)
    return family


def _namespace_family(family: GaugeMetricFamily, attribute: str, stats: ServerStats) -> Metric:
    for tier, tier_stats in stats.tiers.items():
        shown = dict(largest_namespaces(tier_stats, _MAX_NAMESPACES))
        for namespace, usage in shown.items():
            family.add_metric((tier, namespace), getattr(usage, attribute))
        hidden: list[NamespaceUsage] = [
            usage for namespace, usage in tier_stats.namespaces.items() if namespace not in shown
        ]
        if hidden:
            family.add_metric((tier, OTHER_NAMESPACES), sum(getattr(usage, attribute) for usage in hidden))
    return family


def _shard_family(
    family: GaugeMetricFamily | CounterMetricFamily, attribute: str, stats: ServerStats
) -> Metric:
    for tier, shards in stats.shards.items():
        for shard in shards:
            family.add_metric((tier, shard.name), getattr(shard, attribute))
    return family


class MetricsEndpoint:
    """HTTP server for the metrics, on a thread of its own until `close()`.

    Raises:
        ConfigError: The port cannot be had.
    """

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(f"cannot show metrics on {host}:{port}: {error.strerror}") from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop listening and wait for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
