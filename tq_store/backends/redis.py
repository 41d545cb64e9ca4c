"""Blocks in Redis or Valkey: under which key a block is, and what puts, gets and removes it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tq_store.backends.redis_census import Census
from tq_store.backends.redis_servers import RedisServers, all_answers
from tq_store.backends.redis_shard import Command, Shard
from tq_store.backends.redis_target import RedisTarget, parse_target
from tq_store.errors import BackendError, BackendFull, BackendUnavailable, ConfigError
from tq_store.keys import BlockKey, split_key
from tq_store.results import BackendStats, PutOutcome, ShardStats

_BLOCKS = "tq:1"
_QUARANTINE = "tq:quarantine:1"
_QUARANTINE_TTL_S = 24 * 3600
_SCAN_KEYS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLimits:
    """What the Redis tier waits for, and how long it keeps.

    Args:
        timeout_s: Longest silence of a server that moves blocks, and longest wait for a turn.
        lookup_timeout_s: The same for what moves none.
        ttl_s: How long a block stays that is neither put nor got; None leaves it to the server's eviction.
        census_s: Rest between two counts of blocks by namespace; None for no counts.
    """

    timeout_s: float = 2.0
    lookup_timeout_s: float = 0.5
    ttl_s: float | None = None
    census_s: float | None = 30.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.lookup_timeout_s <= 0 or (self.ttl_s is not None and self.ttl_s < 1):
            raise ConfigError(
                f"the redis tier needs timeouts above 0 and a time to live of at least 1 s, "
                f"not {self.timeout_s}, {self.lookup_timeout_s} and {self.ttl_s}"
            )


class RedisBackend:
    """Blocks under ``tq:1:<namespace hex>:<prefix hex>``, header and payload in one value.

    Made by `open`. The servers keep the budget and evict by their own `maxmemory-policy`. Corrupt blocks are
    renamed to ``tq:quarantine:1:{<key>}`` for a day, which is the same hash slot.

    With several servers, those that fail cost their own keys only: a read misses, a put is refused, both
    counted by shard. When all of them fail, and with a single server, the error is raised.
    """

    def __init__(self, target: RedisTarget, limits: RedisLimits) -> None:
        self._limits = limits
        self._servers = RedisServers(target, probe_timeout_s=limits.lookup_timeout_s)
        self._census = Census()
        self._counting: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(cls, url: str, *, limits: RedisLimits | None = None, **access: Any) -> "RedisBackend":
        """Connect, learn who owns which key, and ask for a sign of life.

        Args:
            url: See `parse_target`, like `access`.
            limits: Deadlines and time to live.
            access: Users, password files and TLS files.

        Raises:
            ConfigError: The URL, a file or a number is not usable.
            BackendError: No server answers, or they turn us away.
        """
        backend = cls(parse_target(url, **access), limits or RedisLimits())
        try:
            await backend._open()
        except BaseException:
            await backend.close()
            raise
        return backend

    @property
    def name(self) -> str:
        """Short name for metrics and logs."""
        return "redis"

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there: one round trip to each server, all at once."""
        commands = [(b"EXISTS", _redis_key(key)) for key in keys]
        return [found == 1 for found in await self._send(commands, self._limits.lookup_timeout_s)]

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Fetch blocks in as many round trips as their bytes ask for; one that is found lives on."""
        if self._limits.ttl_s is None:
            commands: list[Command] = [(b"GET", _redis_key(key)) for key in keys]
        else:
            ttl = (b"PX", b"%d" % (self._limits.ttl_s * 1000))
            commands = [(b"GETEX", _redis_key(key), *ttl) for key in keys]
        replies = await self._send(commands, self._limits.timeout_s)
        return [reply if isinstance(reply, bytes) else None for reply in replies]

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Set what is not there yet; if a server runs out of memory, what was set before stays.

        Raises:
            BackendFull: The only server is at `maxmemory` and may not evict.
        """
        ttl_s = self._limits.ttl_s
        options = (b"NX",) if ttl_s is None else (b"NX", b"PX", b"%d" % (ttl_s * 1000))
        commands = [(b"SET", _redis_key(key), block, *options) for key, block in blocks]
        replies = await self._send(commands, self._limits.timeout_s)
        full = next((reply for reply in replies if isinstance(reply, BackendFull)), None)
        if full is not None and len(self._servers.shards) == 1:
            raise full
        return [_outcome(reply) for reply in replies]

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Unlink blocks; the servers free the memory in the background.

        Raises:
            BackendError: A server failed; its blocks may still be there, those of the others are not.
        """
        commands = [(b"UNLINK", _redis_key(key)) for key in keys]
        replies = await self._send(commands, self._limits.timeout_s)
        for reply in replies:
            if isinstance(reply, BackendError):
                raise reply
        return [removed == 1 for removed in replies]

    async def quarantine(self, key: BlockKey) -> None:
        """Rename a block out of the way; the server forgets it after a day.

        Raises:
            BackendError: The only server failed; where there are several, the next who reads it tries again.
        """
        self._check_open()
        here = _redis_key(key)
        aside = b"%s:{%s}" % (_QUARANTINE.encode(), here)
        transaction: list[Command] = [
            (b"MULTI",),
            (b"RENAME", here, aside),
            (b"EXPIRE", aside, b"%d" % _QUARANTINE_TTL_S),
            (b"EXEC",),
        ]
        owner = self._servers.owner(here)
        if owner is not None:
            # what can fail within the transaction is only a key that is gone
            replies = await owner.ask(transaction, timeout_s=self._limits.timeout_s)
            self._servers.raise_if_all_fail(replies)

    async def purge(self, namespace: bytes | None = None) -> int:
        """Scan every server for the keys of a namespace digest, or all of tq-store's, and unlink them.

        Quarantined blocks go too, but do not count.

        Raises:
            BackendError: A server failed and may still hold blocks; the others were purged.
        """
        self._check_open()
        suffix = "*" if namespace is None else f"{namespace.hex()}:*"

        async def purge_one(shard: Shard) -> int:
            await self._unlink_matching(shard, f"{_QUARANTINE}:{{{_BLOCKS}:{suffix}")
            return await self._unlink_matching(shard, f"{_BLOCKS}:{suffix}")

        removed = await asyncio.gather(*map(purge_one, self._servers.shards), return_exceptions=True)
        self._census.forget(namespace)
        return sum(all_answers(removed))

    async def stats(self) -> BackendStats:
        """What the servers that answer say of themselves, which includes keys and overhead not ours."""
        self._check_open()
        timeout_s = self._limits.lookup_timeout_s
        facts = await self._servers.ask_all([shard.facts(timeout_s) for shard in self._servers.shards])
        has_budget = all(fact.max_bytes for fact in facts)
        return BackendStats(
            num_blocks=sum(fact.num_keys for fact in facts),
            used_bytes=sum(fact.used_bytes for fact in facts),
            budget_bytes=sum(fact.max_bytes for fact in facts) if has_budget else None,
            evicted_blocks=sum(fact.evicted_keys for fact in facts),
            namespaces=self._census.namespaces,
        )

    def shards(self) -> list[ShardStats]:
        """How each server has behaved; ``gone`` sums up those that own keys no more."""
        return self._servers.stats()

    async def close(self) -> None:
        """Close all connections; calls under way fail with BackendUnavailable."""
        self._closed = True
        if self._counting is not None:
            self._counting.cancel()
            await asyncio.wait([self._counting])
        await self._servers.close()

    async def _open(self) -> None:
        limits = self._limits
        await self._servers.open(timeout_s=limits.timeout_s, has_ttl=limits.ttl_s is not None)
        if limits.census_s is not None:
            self._counting = asyncio.create_task(self._count(limits.census_s))

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable("the redis tier is closed")

    async def _send(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        self._check_open()
        return await self._servers.send(commands, timeout_s)

    async def _unlink_matching(self, shard: Shard, pattern: str) -> int:
        cursor, num_removed = 0, 0
        while True:
            cursor, found = await shard.scan(
                cursor, match=pattern, count=_SCAN_KEYS, timeout_s=self._limits.timeout_s
            )
            removed = await self._send([(b"UNLINK", key) for key in found], self._limits.timeout_s)
            num_removed += sum(reply for reply in all_answers(removed) if isinstance(reply, int))
            if cursor == 0:
                return num_removed

    async def _count(self, rest_s: float) -> None:
        while True:
            await self._census.take(self._servers.shards, timeout_s=self._limits.timeout_s)
            await asyncio.sleep(rest_s)


def _redis_key(key: BlockKey) -> bytes:
    namespace, prefix = split_key(key)
    return f"{_BLOCKS}:{namespace.hex()}:{prefix.hex()}".encode()


def _outcome(reply: Any) -> PutOutcome:
    if isinstance(reply, BackendError):
        return PutOutcome.REFUSED
    return PutOutcome.PRESENT if reply is None else PutOutcome.STORED
