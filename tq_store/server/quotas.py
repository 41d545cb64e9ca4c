"""Limits of tenants: how often they may call, and how much they may hold."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tq_store.errors import OverLimit
from tq_store.keys import BlockKey
from tq_store.results import NamespaceUsage
from tq_store.server.calls import Call
from tq_store.server.metrics import Metrics
from tq_store.server.tenants import Tenant

_FULL_RETRY_S = 60.0
"""When a tenant that holds all it may should try again: nothing is sure to have gone by then."""
_BUSY_RETRY_S = 0.1
_SPARE_PART = 20
"""Of a full quota this part is freed at once: looking for what may go is not for every block."""
_MOST_REMOVED = 4096
_MOST_ROUNDS = 8


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


@dataclass(frozen=True, slots=True)
class _Excess:
    """What would be too much; nothing where a number is not positive."""

    num_bytes: int
    num_blocks: int

    @property
    def is_any(self) -> bool:
        """Whether anything would."""
        return self.num_bytes > 0 or self.num_blocks > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What a tenant holds, and may hold.

    Args:
        quota_bytes: None for a tenant without one; so is `quota_blocks`.
    """

    tenant: str
    num_blocks: int
    used_bytes: int
    quota_bytes: int | None = None
    quota_blocks: int | None = None


class Realms(Protocol):
    """What quotas ask of the media; `RealmUsage` answers."""

    def of(self, tag: bytes) -> Iterable[NamespaceUsage]:
        """What a realm holds, medium by medium."""

    async def first_to_go(self, tag: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a realm that come to about both sizes; empty where nothing is to be chosen."""


class Quotas:
    """Keeps tenants within their limits. Called from one event loop.

    A realm's usage is what the medium that holds most of it says, and what is on its way. Tiers are written
    one after the other, so it may be passed by what waits in write queues.

    Args:
        metrics: Told of each refusal.
        realms: What realms hold, and what of it could go.
        remove: Removes blocks from every tier; says which were there.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Metrics,
        realms: Realms,
        remove: Callable[[Sequence[BlockKey]], Awaitable[Sequence[bool]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._realms = realms
        self._remove = remove
        self._clock = clock
        self._allowances: dict[str, _Allowance] = {}
        self._making_room: defaultdict[bytes, asyncio.Lock] = defaultdict(asyncio.Lock)
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

    async def reserve(self, call: Call, num_bytes: int, *, num_blocks: int = 1) -> None:
        """Have room in a quota for what a call is about to store, until `release`.

        Where there is none, blocks of the realm go, the least worth keeping first, and some more, so that the
        next call finds room.

        Raises:
            OverLimit: It is more than the whole quota, or what could go is not this server's to choose.
        """
        tenant = call.tenant
        if not tenant.has_quota:
            return
        if self._excess(tenant, num_bytes, num_blocks).is_any:
            async with self._making_room[tenant.realm_tag]:
                await self._make_room(tenant, num_bytes, num_blocks)
        excess = self._excess(tenant, num_bytes, num_blocks)
        if excess.num_bytes > 0:
            self._refuse(tenant, "bytes", f"{num_bytes} bytes more would exceed {tenant.quota_bytes} bytes")
        if excess.num_blocks > 0:
            self._refuse(tenant, "keys", f"{num_blocks} blocks more would exceed {tenant.quota_keys} blocks")
        pending = self._pending[tenant.realm_tag]
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
        media = [*self._realms.of(tenant.realm_tag), NamespaceUsage(num_blocks=0, used_bytes=0)]
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

    def _excess(self, tenant: Tenant, num_bytes: int, num_blocks: int) -> "_Excess":
        """What a tenant would hold beyond its quotas."""
        usage = self.usage(tenant)
        pending = self._pending.get(tenant.realm_tag, _Pending())
        used_bytes = usage.used_bytes + pending.num_bytes + num_bytes
        used_blocks = usage.num_blocks + pending.num_blocks + num_blocks
        return _Excess(
            num_bytes=used_bytes - (used_bytes if tenant.quota_bytes is None else tenant.quota_bytes),
            num_blocks=used_blocks - (used_blocks if tenant.quota_keys is None else tenant.quota_keys),
        )

    async def _make_room(self, tenant: Tenant, num_bytes: int, num_blocks: int) -> None:
        """Remove blocks of the realm until these would fit, if they can; one call of a realm at a time."""
        quota_bytes, quota_keys = tenant.quota_bytes, tenant.quota_keys
        if num_bytes > (quota_bytes or num_bytes) or num_blocks > (quota_keys or num_blocks):
            return
        for _ in range(_MOST_ROUNDS):
            excess = self._excess(tenant, num_bytes, num_blocks)
            if not excess.is_any:
                return
            keys = await self._realms.first_to_go(
                tenant.realm_tag,
                num_bytes=excess.num_bytes + (quota_bytes or 0) // _SPARE_PART if excess.num_bytes > 0 else 0,
                num_blocks=excess.num_blocks + (quota_keys or 0) // _SPARE_PART
                if excess.num_blocks > 0
                else 0,
            )
            if not keys:
                return
            removed = await self._remove(keys[:_MOST_REMOVED])
            self._metrics.evicted(tenant.name, sum(removed))

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
