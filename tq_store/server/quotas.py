"""Limits of tenants: how often they may call, and how much they may hold."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tq_store.errors import OverLimit
from tq_store.results import NamespaceUsage
from tq_store.server.calls import Call
from tq_store.server.metrics import Metrics
from tq_store.server.scrape import TenantUsage
from tq_store.server.tenants import Tenant

_FULL_RETRY_S = 60.0
"""When a tenant that holds all it may should try again: nothing is sure to have gone by then."""
_BUSY_RETRY_S = 0.1


@dataclass(slots=True)
class _Allowance:
    """Calls that a tenant may make right now; grows with time up to a second's worth."""

    calls: float
    updated_s: float


@dataclass(slots=True)
class _Pending:
    """What is being received for a realm and not yet counted by a medium."""

    num_bytes: int = 0
    num_blocks: int = 0


class Quotas:
    """Keeps tenants within their limits. Called from one event loop.

    A realm's usage is what the medium that holds most of it says, and what is on its way. Tiers are written
    one after the other, so it may be passed by what waits in write queues.

    Args:
        metrics: Told of each refusal.
        usage_of: What a realm, by its tag, holds in each medium.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Metrics,
        usage_of: Callable[[bytes], Iterable[NamespaceUsage]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._usage_of = usage_of
        self._clock = clock
        self._allowances: dict[str, _Allowance] = {}
        self._num_active: Counter[str] = Counter()
        self._pending: defaultdict[bytes, _Pending] = defaultdict(_Pending)

    def begin(self, call: Call) -> None:
        """Count a call, until `end`.

        Raises:
            OverLimit: Its tenant calls too often, or has too many calls in flight.
        """
        tenant = call.tenant
        if tenant.calls_at_once is not None:
            if self._num_active[tenant.name] >= tenant.calls_at_once:
                self._metrics.limited(tenant.name, "calls")
                raise OverLimit(
                    f"{tenant.name} has {tenant.calls_at_once} calls in flight, as many as it may",
                    retry_after_s=_BUSY_RETRY_S,
                )
            self._num_active[tenant.name] += 1
            call.is_counted = True
        self._spend(tenant)

    def end(self, call: Call) -> None:
        """Forget a call that was begun, or was refused."""
        self.release(call)
        if call.is_counted:
            call.is_counted = False
            self._num_active[call.tenant.name] -= 1

    def _spend(self, tenant: Tenant) -> None:
        rate = tenant.calls_per_second
        if rate is None:
            return
        now_s = self._clock()
        allowance = self._allowances.setdefault(tenant.name, _Allowance(rate, now_s))
        allowance.calls = min(rate, allowance.calls + (now_s - allowance.updated_s) * rate)
        allowance.updated_s = now_s
        if allowance.calls < 1:
            self._metrics.limited(tenant.name, "rate")
            raise OverLimit(
                f"more than the {rate} calls a second that {tenant.name} may make",
                retry_after_s=(1 - allowance.calls) / rate,
            )
        allowance.calls -= 1

    def reserve(self, call: Call, num_bytes: int, *, num_blocks: int = 1) -> None:
        """Have room in a quota for what a call is about to store, until `release`.

        Raises:
            OverLimit: There is none.
        """
        tenant = call.tenant
        if tenant.quota_bytes is None and tenant.quota_keys is None:
            return
        usage, pending = self.usage(tenant), self._pending[tenant.realm_tag]
        used_bytes = usage.used_bytes + pending.num_bytes + num_bytes
        if tenant.quota_bytes is not None and used_bytes > tenant.quota_bytes:
            self._refuse(tenant, "bytes", f"{num_bytes} bytes more would exceed {tenant.quota_bytes} bytes")
        used_keys = usage.num_blocks + pending.num_blocks + num_blocks
        if tenant.quota_keys is not None and used_keys > tenant.quota_keys:
            self._refuse(tenant, "keys", f"{num_blocks} blocks more would exceed {tenant.quota_keys} blocks")
        pending.num_bytes += num_bytes
        pending.num_blocks += num_blocks
        call.reserved = (num_bytes, num_blocks)

    def release(self, call: Call) -> None:
        """Forget what was reserved, if anything: the block is stored now, or never will be."""
        if call.reserved is None:
            return
        tag, (num_bytes, num_blocks) = call.tenant.realm_tag, call.reserved
        pending = self._pending[tag]
        pending.num_bytes -= num_bytes
        pending.num_blocks -= num_blocks
        call.reserved = None
        if not pending.num_blocks:
            del self._pending[tag]

    def usage(self, tenant: Tenant) -> TenantUsage:
        """What a tenant's realm holds; for a group, what all its tenants hold together."""
        media = [*self._usage_of(tenant.realm_tag), NamespaceUsage(num_blocks=0, used_bytes=0)]
        return TenantUsage(
            tenant=tenant.name,
            num_blocks=max(usage.num_blocks for usage in media),
            used_bytes=max(usage.used_bytes for usage in media),
            quota_bytes=tenant.quota_bytes,
            quota_blocks=tenant.quota_keys,
        )

    def usage_by_label(self, tenants: Iterable[Tenant]) -> list[TenantUsage]:
        """The usage of many, for metrics: those that share a label are added up."""
        by_label: dict[str, TenantUsage] = {}
        for tenant in tenants:
            label, held = self._metrics.tenant_label(tenant.name), self.usage(tenant)
            known = by_label.get(label)
            by_label[label] = replace(held, tenant=label) if known is None else _sum(known, held)
        return list(by_label.values())

    def _refuse(self, tenant: Tenant, limit: str, what: str) -> None:
        self._metrics.limited(tenant.name, limit)
        raise OverLimit(
            f"the quota of {tenant.name} is used up: {what}; raise it, or delete blocks",
            retry_after_s=_FULL_RETRY_S,
        )


def _sum(one: TenantUsage, other: TenantUsage) -> TenantUsage:
    return TenantUsage(
        tenant=one.tenant,
        num_blocks=one.num_blocks + other.num_blocks,
        used_bytes=one.used_bytes + other.used_bytes,
    )
