"""The store as the tenant of the running call sees it: its own keys, its own blocks, its own counts."""

from collections import Counter
from collections.abc import Sequence

from tq_store.block import bf16_bytes
from tq_store.errors import NotPermitted
from tq_store.keys import DIGEST_BYTES, BlockKey
from tq_store.results import PutOutcome
from tq_store.server.activity import Activity
from tq_store.server.calls import CALL, Call
from tq_store.server.metrics import Metrics
from tq_store.server.quotas import Quotas
from tq_store.tiering.store import StoreStats, TieredStore


class TenantStore:
    """The methods of `TieredStore`, for keys as the caller knows them.

    Blocks of other tenants cannot be named, so they are absent, by the same steps as what does not exist.

    Args:
        store: Owned by the caller.
        metrics: Told what was found and stored.
        activity: Told which of the store's namespaces are used.
        quotas: Asked before a block is received.

    Raises:
        NotPermitted: A namespace that the tenant may not use; whether anything is there makes no difference.
    """

    def __init__(self, store: TieredStore, metrics: Metrics, activity: Activity, quotas: Quotas) -> None:
        self._store = store
        self._metrics = metrics
        self._activity = activity
        self._quotas = quotas

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are in some tier."""
        return await self._store.contains(_store_keys(CALL.get(), keys))

    async def lookup(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the first on are there without a gap."""
        store_keys = _store_keys(CALL.get(), keys)
        num_hits = await self._store.lookup(store_keys)
        self._metrics.looked_up(len(keys), num_hits)
        self._activity.looked_up(store_keys, num_hits)
        return num_hits

    def sizes_at_hand(self, keys: Sequence[BlockKey]) -> list[int]:
        """Lengths of the leading blocks that a get would find in memory, and so wait for nothing.

        None where a get is refused, which names the keys in the call's record.
        """
        try:
            store_keys = _named(CALL.get(), keys)
        except NotPermitted:
            return []
        return self._store.sizes_at_hand(store_keys)

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Blocks, or None for a miss. They count when they have been served."""
        return await self._store.get(_store_keys(CALL.get(), keys))

    def served(self, keys: Sequence[BlockKey], blocks: Sequence[bytes | None]) -> None:
        """The caller was given these blocks, or told of misses."""
        call = CALL.get()
        sent_bytes: Counter[bytes] = Counter()
        num_hits = saved_bytes = 0
        for key, block in zip(keys, blocks, strict=True):
            if block is not None:
                num_hits += 1
                saved_bytes += bf16_bytes(block) - len(block)
                sent_bytes[key[:DIGEST_BYTES]] += len(block)
        for namespace, num_bytes in sent_bytes.items():
            self._activity.sent(call.tenant.store_namespace(namespace), num_bytes)
        call.num_bytes += sent_bytes.total()
        self._metrics.got(
            call.tenant.name,
            num_hits=num_hits,
            num_misses=len(keys) - num_hits,
            num_bytes=sent_bytes.total(),
            saved_bytes=saved_bytes,
        )

    async def expect(self, num_bytes: int) -> None:
        """A block of this length is about to be received: better refused now than when it is there.

        Raises:
            OverLimit: The tenant has no room for it.
        """
        await self._quotas.reserve(CALL.get(), num_bytes)

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Check blocks and store them; where there is a quota, one by one, as the next may need its room.

        Raises:
            OverLimit: The tenant has no room for a block; those before it are stored.
        """
        call = CALL.get()
        if call.tenant.has_quota:
            return [outcome for block in blocks for outcome in await self._put(call, [block])]
        return await self._put(call, blocks)

    async def _put(self, call: Call, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        keys = _store_keys(call, [key for key, _ in blocks])
        if call.reserved is None:
            await self._quotas.reserve(call, sum(len(block) for _, block in blocks), num_blocks=len(blocks))
        outcomes = await self._store.put([(key, block) for key, (_, block) in zip(keys, blocks, strict=True)])
        stored = [
            block
            for (_, block), outcome in zip(blocks, outcomes, strict=True)
            if outcome is PutOutcome.STORED
        ]
        self._quotas.release(call)
        for key, (_, block) in zip(keys, blocks, strict=True):
            self._activity.received(key[:DIGEST_BYTES], len(block))
        num_bytes = sum(map(len, stored))
        call.num_bytes += num_bytes
        saved_bytes = sum(map(bf16_bytes, stored)) - num_bytes
        self._metrics.put(call.tenant.name, num_bytes=num_bytes, saved_bytes=saved_bytes)
        return outcomes

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove blocks from every tier; True where any tier had one."""
        return await self._store.delete(_store_keys(CALL.get(), keys))

    async def purge(self, namespace: bytes | None) -> int:
        """Remove a namespace, or everything; returns how many copies.

        An admin names namespaces as the store does, and as `stats` shows them; others their own.

        Raises:
            NotPermitted: Everything, and not an admin.
        """
        call = CALL.get()
        call.note_namespace(namespace)
        if call.is_admin:
            return await self._store.purge(namespace)
        if namespace is None:
            raise NotPermitted("to purge everything takes an admin; name a namespace")
        _check_allowed(call, namespace)
        return await self._store.purge(call.tenant.store_namespace(namespace))

    async def stats(self) -> StoreStats:
        """What is held and what was done, for all tenants together."""
        return await self._store.stats()


def _store_keys(call: Call, keys: Sequence[BlockKey]) -> list[BlockKey]:
    """The store's keys for those of a caller; notes them in the call's record."""
    call.note_keys(keys)
    return _named(call, keys)


def _named(call: Call, keys: Sequence[BlockKey]) -> list[BlockKey]:
    """The store's keys for those of a caller."""
    if not call.tenant.name:
        return list(keys)
    store_namespaces = {}
    for namespace in {key[:DIGEST_BYTES] for key in keys}:
        _check_allowed(call, namespace)
        store_namespaces[namespace] = call.tenant.store_namespace(namespace)
    return [BlockKey(store_namespaces[key[:DIGEST_BYTES]] + key[DIGEST_BYTES:]) for key in keys]


def _check_allowed(call: Call, namespace: bytes) -> None:
    allowed = call.tenant.namespaces
    if allowed and namespace not in allowed:
        raise NotPermitted(f"{call.tenant.name} may not use this namespace")
