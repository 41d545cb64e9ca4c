"""What is asked only when somebody scrapes: the store's statistics as metrics."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tq_store.results import BackendStats, NamespaceUsage, largest_namespaces
from tq_store.server import metric_table as table
from tq_store.server.metric_table import Definition, Type
from tq_store.server.quotas import TenantUsage
from tq_store.tiering.store import StoreStats

logger = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 2.0

Labels = TypeVar("Labels", bound=tuple[str, ...])

_EVENTS = {
    "misses": table.MISSES,
    "joined_loads": table.JOINED_LOADS,
    "promotions": table.PROMOTIONS,
    "quarantined": table.CORRUPT_BLOCKS,
    "unsupported": table.UNSUPPORTED_BLOCKS,
    "dropped_writes": table.DROPPED_WRITES,
    "refused": table.REFUSED_BLOCKS,
    "invalid": table.INVALID_BLOCKS,
}
_TIER_EVENTS = {"hits_": table.HITS, "tier_errors_": table.TIER_ERRORS}
_TIER_STATS = {
    "num_blocks": table.TIER_BLOCKS,
    "used_bytes": table.TIER_USED_BYTES,
    "budget_bytes": table.TIER_BUDGET_BYTES,
    "evicted_blocks": table.TIER_EVICTED_BLOCKS,
}
_NAMESPACE_STATS = {
    "num_blocks": table.NAMESPACE_BLOCKS,
    "used_bytes": table.NAMESPACE_USED_BYTES,
}
_SHARD_STATS = {
    "is_open": table.SHARD_OPEN,
    "failed_calls": table.SHARD_FAILED_CALLS,
    "lost_keys": table.SHARD_LOST_KEYS,
}
_QUEUE_STATS = {
    "num_blocks": table.WRITE_QUEUE_BLOCKS,
    "used_bytes": table.WRITE_QUEUE_BYTES,
    "limit_bytes": table.WRITE_QUEUE_LIMIT_BYTES,
}
_TENANT_STATS = {
    "used_bytes": table.TENANT_USED_BYTES,
    "num_blocks": table.TENANT_BLOCKS,
    "quota_bytes": table.TENANT_QUOTA_BYTES,
    "quota_blocks": table.TENANT_QUOTA_BLOCKS,
}


class StoreCollector(Collector):
    """Asks the store for its statistics whenever somebody scrapes.

    Called from the HTTP server's threads; the question runs on the server's event loop. A store that does not
    answer in two seconds is left out of the scrape, so that the rest is still seen.

    Args:
        read_stats: The store's statistics.
        read_usage: What each tenant holds, labels already bounded; called on the event loop too.
        loop: The server's.
        version: The server's.
    """

    def __init__(
        self,
        read_stats: Callable[[], Coroutine[Any, Any, StoreStats]],
        read_usage: Callable[[], Iterable[TenantUsage]],
        loop: asyncio.AbstractEventLoop,
        *,
        version: str,
    ) -> None:
        self._read_stats = read_stats
        self._read_usage = read_usage
        self._loop = loop
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """The store's metrics at this moment."""
        build = _family(table.BUILD_INFO)
        build.add_metric((self._version,), 1)
        yield build
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            stats, usage = reading.result(_SCRAPE_TIMEOUT_S)
        except TimeoutError:
            reading.cancel()
            logger.warning("the store did not tell its statistics within %s s", _SCRAPE_TIMEOUT_S)
            return
        yield from _event_families(stats.counters)
        yield from _families(_TIER_STATS, {(tier,): held for tier, held in stats.tiers.items()})
        yield from _families(_QUEUE_STATS, {(tier,): queue for tier, queue in stats.queues.items()})
        yield from _families(_TENANT_STATS, {(held.tenant,): held for held in usage})
        yield from _families(_NAMESPACE_STATS, _by_namespace(stats.tiers))
        shards = {(tier, shard.name): shard for tier, in_tier in stats.shards.items() for shard in in_tier}
        yield from _families(_SHARD_STATS, shards)

    async def _read(self) -> tuple[StoreStats, list[TenantUsage]]:
        return await self._read_stats(), list(self._read_usage())


def _family(definition: Definition) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if definition.type is Type.COUNTER else GaugeMetricFamily
    return kind(definition.name, definition.meaning, labels=definition.labels)


def _event_families(counters: Mapping[str, int]) -> Iterator[Metric]:
    """Each counter of the store under the metric that it has, or else as an event by its name."""
    by_tier = {prefix: _family(definition) for prefix, definition in _TIER_EVENTS.items()}
    events = _family(table.EVENTS)
    for name, value in counters.items():
        prefix = next((prefix for prefix in by_tier if name.startswith(prefix)), None)
        if name in _EVENTS:
            family = _family(_EVENTS[name])
            family.add_metric((), value)
            yield family
        elif prefix is not None:
            by_tier[prefix].add_metric((name.removeprefix(prefix),), value)
        else:
            events.add_metric((name,), value)
    yield from (*by_tier.values(), events)


def _families(definitions: Mapping[str, Definition], holders: Mapping[Labels, Any]) -> Iterator[Metric]:
    """Attributes of labelled objects as metrics; what is None is left out."""
    for attribute, definition in definitions.items():
        family = _family(definition)
        for labels, holder in holders.items():
            value = getattr(holder, attribute)
            if value is not None:
                family.add_metric(labels, value)
        yield family


def _by_namespace(tiers: Mapping[str, BackendStats]) -> dict[tuple[str, str], NamespaceUsage]:
    """The largest namespaces of each tier, and the rest of it together."""
    shown: dict[tuple[str, str], NamespaceUsage] = {}
    for tier, held in tiers.items():
        by_size = largest_namespaces(held, len(held.namespaces))
        shown |= {(tier, name): usage for name, usage in by_size[: table.MAX_NAMESPACE_LABELS]}
        rest = [usage for _, usage in by_size[table.MAX_NAMESPACE_LABELS :]]
        if rest:
            shown[tier, table.OTHER] = NamespaceUsage(
                num_blocks=sum(usage.num_blocks for usage in rest),
                used_bytes=sum(usage.used_bytes for usage in rest),
            )
    return shown
