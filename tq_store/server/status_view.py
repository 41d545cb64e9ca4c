"""From readings of the metrics to the status that people see."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

from tq_store.server import metric_table as table
from tq_store.server.activity import Activity
from tq_store.server.readings import Reading, Sampler, quantile
from tq_store.status import CallStatus, Moment, NamespaceStatus, Status, TierStatus

_WINDOW_S = 30.0
_NUM_NAMESPACES = 10
_DIGITS = 12
_METHODS = {"Lookup": ("Lookup",), "Get": ("Get", "GetPiped", "GetShared"), "Put": ("Put", "PutShared")}
"""As people see them, with those that do the same through pipes and shared memory."""
_TROUBLES = {
    "corrupt blocks": table.CORRUPT_BLOCKS,
    "dropped writes": table.DROPPED_WRITES,
    "refused blocks": table.REFUSED_BLOCKS,
    "invalid blocks": table.INVALID_BLOCKS,
    "unsupported blocks": table.UNSUPPORTED_BLOCKS,
    "calls turned away": table.DENIED,
    "tier errors": table.TIER_ERRORS,
}


class StatusView:
    """The server's status, computed when asked for. Called from any thread.

    Args:
        sampler: The metrics over time.
        activity: Which namespaces are used.
        clock: Seconds, monotonic; tells the uptime.
    """

    def __init__(
        self, sampler: Sampler, activity: Activity, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sampler = sampler
        self._activity = activity
        self._clock = clock
        self._started_s = clock()

    def status(self) -> Status:
        """As of the last reading."""
        readings = self._sampler.readings() or [Reading(clock_s=0.0, samples={})]
        now = readings[-1]
        then = next(reading for reading in readings if now.clock_s - reading.clock_s <= _WINDOW_S)
        change = _Change(then, now)
        since_start = _Change(Reading(clock_s=0.0, samples={}), now)
        versions = now.by(table.BUILD_INFO.name, "version")
        return Status(
            version=next(iter(versions), ""),
            uptime_s=self._clock() - self._started_s,
            window_s=change.elapsed_s,
            step_s=self._sampler.step_s,
            hit_ratio=change.hit_ratio(),
            total_hit_ratio=since_start.hit_ratio(),
            sent_bytes_per_s=change.rate(table.SENT_BYTES),
            received_bytes_per_s=change.rate(table.RECEIVED_BYTES),
            saved_bytes=int(now.total(table.SAVED_BYTES.name, direction="got")),
            active_requests=int(now.total(table.ACTIVE_REQUESTS.name)),
            max_requests=int(now.total(table.MAX_REQUESTS.name)),
            inflight_bytes=int(now.total(table.INFLIGHT_BYTES.name)),
            max_inflight_bytes=int(now.total(table.MAX_INFLIGHT_BYTES.name)),
            troubles={name: int(now.total(metric.name)) for name, metric in _TROUBLES.items()},
            tiers=_tiers(change),
            calls=[_call(change, name, methods) for name, methods in _METHODS.items()],
            namespaces=self._namespaces(),
            history=[_moment(_Change(*pair)) for pair in pairwise(readings)],
        )

    def _namespaces(self) -> list[NamespaceStatus]:
        return [
            NamespaceStatus(
                digest=digest.hex()[:_DIGITS],
                asked_keys=counts.asked_keys,
                found_keys=counts.found_keys,
                sent_bytes=counts.sent_bytes,
                received_bytes=counts.received_bytes,
            )
            for digest, counts in self._activity.busiest(_NUM_NAMESPACES)
        ]


class _Change:
    """What happened between two readings."""

    def __init__(self, then: Reading, now: Reading) -> None:
        self.now = now
        self.elapsed_s = now.clock_s - then.clock_s
        self._then = then

    def count(self, metric: table.Definition, **labels: str) -> float:
        """By how much a counter grew."""
        return self.now.total(metric.name, **labels) - self._then.total(metric.name, **labels)

    def rate(self, metric: table.Definition, **labels: str) -> float:
        """By how much a second; 0 where no time has passed."""
        return self.count(metric, **labels) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def hit_ratio(self) -> float | None:
        """Share of the keys of lookups that were hits, or None without lookups."""
        return _share(self.count(table.LOOKUP_KEYS, result="hit"), self.count(table.LOOKUP_KEYS))

    def buckets(self, metric: table.Definition, **labels: str) -> dict[str, float]:
        """By how much the buckets of a histogram grew."""
        name = f"{metric.name}_bucket"
        before = self._then.by(name, "le", **labels)
        after = self.now.by(name, "le", **labels)
        return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _moment(change: _Change) -> Moment:
    return Moment(
        sent_bytes_per_s=change.rate(table.SENT_BYTES),
        received_bytes_per_s=change.rate(table.RECEIVED_BYTES),
        hit_ratio=change.hit_ratio(),
    )


def _call(change: _Change, name: str, methods: Sequence[str]) -> CallStatus:
    buckets: defaultdict[str, float] = defaultdict(float)
    for method in methods:
        for bound, count in change.buckets(table.REQUEST_SECONDS, method=method).items():
            buckets[bound] += count
    return CallStatus(
        method=name,
        calls_per_s=sum(change.rate(table.REQUESTS, method=method) for method in methods),
        p50_s=quantile(buckets, 0.5),
        p99_s=quantile(buckets, 0.99),
    )


def _tiers(change: _Change) -> list[TierStatus]:
    now = change.now
    asked = change.count(table.HITS) + change.count(table.MISSES)
    blocks, used, budgets, queues, limits, errors = (
        now.by(metric.name, "tier")
        for metric in (
            table.TIER_BLOCKS,
            table.TIER_USED_BYTES,
            table.TIER_BUDGET_BYTES,
            table.WRITE_QUEUE_BYTES,
            table.WRITE_QUEUE_LIMIT_BYTES,
            table.TIER_ERRORS,
        )
    )
    return [
        TierStatus(
            name=name,
            num_blocks=int(blocks.get(name, 0)),
            used_bytes=int(used.get(name, 0)),
            budget_bytes=_whole(budgets.get(name)),
            hit_share=_share(change.count(table.HITS, tier=name), asked),
            evicted_blocks_per_s=change.rate(table.TIER_EVICTED_BLOCKS, tier=name),
            queue_bytes=_whole(queues.get(name)),
            queue_limit_bytes=_whole(limits.get(name)),
            errors=int(errors.get(name, 0)),
        )
        for name in errors  # a tier that fails tells nothing else
    ]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
