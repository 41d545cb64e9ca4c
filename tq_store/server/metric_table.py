"""Every metric that a server shows: name, type, labels and meaning. `deploy/METRICS.md` is made from this.

Labels are bounded: methods, statuses, tiers and operations are ours; tenants are those of the tenants file,
namespaces the largest of a tier; beyond the bounds below the rest share one label.
"""

from dataclasses import dataclass
from enum import Enum

MAX_TENANT_LABELS = 64
MAX_NAMESPACE_LABELS = 32
OTHER = "other"
"""Label of what may not become one: methods that do not exist, tenants and namespaces beyond the bounds."""

SECONDS_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0),
)


class Type(Enum):
    """Prometheus metric types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    Args:
        name: As Prometheus stores it; a histogram's samples add ``_bucket``, ``_sum`` and ``_count``.
        type: Counters start at 0 with the process.
        meaning: Its help text.
        labels: Label names.
    """

    name: str
    type: Type
    meaning: str
    labels: tuple[str, ...] = ()


def _counter(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(f"tq_store_{name}_total", Type.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(f"tq_store_{name}", Type.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(f"tq_store_{name}", Type.HISTOGRAM, meaning, labels)


REQUESTS = _counter("requests", "Calls by method and gRPC status.", "method", "status")
REQUEST_SECONDS = _histogram("request_seconds", "Time from the start of a call to its end.", "method")
ACTIVE_REQUESTS = _gauge("active_requests", "Calls in flight.")
MAX_REQUESTS = _gauge("max_requests", "Calls that may be in flight at once (max_concurrent_calls).")
INFLIGHT_BYTES = _gauge("inflight_bytes", "Declared bytes of blocks being received.")
MAX_INFLIGHT_BYTES = _gauge("max_inflight_bytes", "Limit of the bytes being received (max_inflight).")
OUTFLIGHT_BYTES = _gauge("outflight_bytes", "Bytes of blocks read for gets or being sent.")
MAX_OUTFLIGHT_BYTES = _gauge("max_outflight_bytes", "Limit of the bytes being sent (max_outflight).")
RECEIVED_BYTES = _counter("received_bytes", "Block bytes received in puts.")
SENT_BYTES = _counter("sent_bytes", "Block bytes sent in gets.")
SAVED_BYTES = _counter(
    "saved_bytes",
    "Bytes that the same tokens would have taken as bf16 on top of what the blocks took; got: read by gets, "
    "put: stored by puts.",
    "direction",
)

HITS = _counter("hits", "Blocks that gets found, by the tier that had them.", "tier")
MISSES = _counter("misses", "Blocks that gets found nowhere.")
JOINED_LOADS = _counter("joined_loads", "Blocks that gets waited for, as another get was loading them.")
LOOKUP_KEYS = _counter("lookup_keys", "Keys of lookups; result is hit (leading hits) or miss.", "result")
PROMOTIONS = _counter("promotions", "Blocks copied from a lower tier to the top one.")

TIER_BLOCKS = _gauge("tier_blocks", "Blocks in a tier.", "tier")
TIER_USED_BYTES = _gauge("tier_used_bytes", "Bytes of the blocks in a tier.", "tier")
TIER_BUDGET_BYTES = _gauge("tier_budget_bytes", "Limit of a tier that keeps one.", "tier")
TIER_EVICTED_BLOCKS = _counter("tier_evicted_blocks", "Blocks that a tier dropped to make room.", "tier")
TIER_SECONDS = _histogram(
    "tier_seconds", "Time of one call to a tier's medium; a call may carry many keys.", "tier", "operation"
)
TIER_ERRORS = _counter("tier_errors", "Calls to a tier's medium that failed.", "tier")
NAMESPACE_BLOCKS = _gauge(
    "namespace_blocks", "Blocks of a namespace in a tier, as last counted.", "tier", "namespace"
)
NAMESPACE_USED_BYTES = _gauge("namespace_used_bytes", "Bytes of those blocks.", "tier", "namespace")
SHARD_OPEN = _gauge("shard_open", "1 while a server of a tier is left alone as it failed.", "tier", "shard")
SHARD_FAILED_CALLS = _counter(
    "shard_failed_calls", "Calls that a server of a tier did not answer.", "tier", "shard"
)
SHARD_LOST_KEYS = _counter(
    "shard_lost_keys", "Misses and refused blocks for want of that server.", "tier", "shard"
)
WRITE_QUEUE_BLOCKS = _gauge("write_queue_blocks", "Blocks waiting to be written to a lower tier.", "tier")
WRITE_QUEUE_BYTES = _gauge("write_queue_bytes", "Bytes waiting or being written to a lower tier.", "tier")
WRITE_QUEUE_LIMIT_BYTES = _gauge("write_queue_limit_bytes", "Limit of that queue (write_queue).", "tier")
DROPPED_WRITES = _counter(
    "dropped_writes", "Blocks not written to a lower tier: its queue was full, or it failed or refused."
)
REFUSED_BLOCKS = _counter("refused_blocks", "Blocks of puts that the top tier had no room for.")
INVALID_BLOCKS = _counter("invalid_blocks", "Blocks of puts that were not sound; never stored.")
CORRUPT_BLOCKS = _counter(
    "corrupt_blocks", "Blocks that a tier gave back damaged; set aside, answered as misses, never served."
)
UNSUPPORTED_BLOCKS = _counter("unsupported_blocks", "Blocks read that only newer servers understand; misses.")
EVENTS = _counter("events", "Events of the store that have no metric of their own, by name.", "event")

TENANT_REQUESTS = _counter("tenant_requests", "Calls of a tenant by gRPC status.", "tenant", "status")
TENANT_HITS = _counter("tenant_hits", "Blocks that a tenant's gets found.", "tenant")
TENANT_MISSES = _counter("tenant_misses", "Blocks that a tenant's gets did not find.", "tenant")
TENANT_READ_BYTES = _counter("tenant_read_bytes", "Block bytes that a tenant's gets found.", "tenant")
TENANT_WRITTEN_BYTES = _counter("tenant_written_bytes", "Block bytes that a tenant's puts stored.", "tenant")
TENANT_LIMITED = _counter(
    "tenant_limited", "Calls refused by a limit of the tenant: bytes, keys, rate or calls.", "tenant", "limit"
)
TENANT_EVICTED_BLOCKS = _counter(
    "tenant_evicted_blocks", "Blocks removed to make room in the quota of the tenant that put.", "tenant"
)
TENANT_USED_BYTES = _gauge("tenant_used_bytes", "Bytes that count against a tenant's quota.", "tenant")
TENANT_BLOCKS = _gauge("tenant_blocks", "Blocks that count against a tenant's quota.", "tenant")
TENANT_QUOTA_BYTES = _gauge("tenant_quota_bytes", "A tenant's quota of bytes, where it has one.", "tenant")
TENANT_QUOTA_BLOCKS = _gauge("tenant_quota_blocks", "A tenant's quota of keys, where it has one.", "tenant")

DENIED = _counter("denied", "Calls turned away: unauthenticated, or not permitted.", "reason")
CREDENTIAL_RELOADS = _counter(
    "credential_reloads", "Times that a changed token or tenants file was read again: ok or failed.", "result"
)
AUDIT_DROPPED = _counter("audit_dropped", "Audit records lost: more came than could be written.")
BUILD_INFO = _gauge("build_info", "Always 1; the label says which version runs.", "version")

DEFINITIONS: tuple[Definition, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Definition)
)
"""All of them, in the order of this file."""
