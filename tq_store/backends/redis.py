"""Blocks in Redis or Valkey, on one server or many: one key per block, every server asked at once."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tq_store.backends.redis_advice import advice
from tq_store.backends.redis_census import Census
from tq_store.backends.redis_shard import Command, Elsewhere, Shard
from tq_store.backends.redis_target import Address, RedisTarget, parse_target
from tq_store.backends.redis_topology import topology_of
from tq_store.errors import BackendBusy, BackendError, BackendFull, BackendUnavailable, ConfigError
from tq_store.keys import BlockKey, split_key
from tq_store.results import BackendStats, PutOutcome, ShardStats

_T = TypeVar("_T")

_BLOCKS = "tq:1"
_QUARANTINE = "tq:quarantine:1"
_QUARANTINE_TTL_S = 24 * 3600
_SCAN_KEYS = 1000
_MAX_HOPS = 3
_WATCH_S = 30.0
"""How often the arrangement is looked at when nothing is wrong."""
_PROBE_PAUSE_S = 0.5
_GONE = "gone"

_log = logging.getLogger(__name__)


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
    counted by shard. When all of them fail, and with a single server, the error is raised. A task of its own
    watches the arrangement, follows a failover, and probes servers that are left alone.
    """

    def __init__(self, target: RedisTarget, limits: RedisLimits) -> None:
        self._target = target
        self._limits = limits
        self._topology = topology_of(target, limits.lookup_timeout_s)
        self._shards: dict[Address, Shard] = {}
        self._gone_failed_calls = self._gone_lost_keys = 0
        self._trouble = asyncio.Event()
        self._learning = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._census = Census()
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
            await backend._learn()
            await backend._greet()
        except BaseException:
            await backend.close()
            raise
        backend._tasks.append(asyncio.create_task(backend._watch()))
        if backend._limits.census_s is not None:
            backend._tasks.append(asyncio.create_task(backend._count(backend._limits.census_s)))
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
        if full is not None and len(self._shards) == 1:
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
        owner = self._topology.owner(here)
        if owner is not None:
            # what can fail within the transaction is only a key that is gone
            self._check(await self._shard(owner).ask(transaction, timeout_s=self._limits.timeout_s))

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

        removed = await asyncio.gather(*map(purge_one, self._shards.values()), return_exceptions=True)
        self._census.forget(namespace)
        return sum(_found(removed))

    async def stats(self) -> BackendStats:
        """What the servers that answer say of themselves, which includes keys and overhead not ours."""
        self._check_open()
        answers = await asyncio.gather(
            *(shard.facts(self._limits.timeout_s) for shard in self._shards.values()), return_exceptions=True
        )
        facts = _found([answer for answer in answers if not isinstance(answer, BackendError)] or answers)
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
        gone = ShardStats(
            name=_GONE,
            is_open=False,
            failed_calls=self._gone_failed_calls,
            lost_keys=self._gone_lost_keys,
        )
        stats = [shard.stats() for shard in self._shards.values()]
        return [*stats, gone] if gone.failed_calls or gone.lost_keys else stats

    async def close(self) -> None:
        """Close all connections; calls under way fail with BackendUnavailable."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for shard in self._shards.values():
            await shard.close()
        await self._topology.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable("the redis tier is closed")

    def _shard(self, address: Address) -> Shard:
        if address not in self._shards:
            self._shards[address] = Shard(address, self._target, self._trouble.set)
        return self._shards[address]

    async def _send(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """One reply per command, or the error for want of which there is none; each goes to its key's owner.

        Raises:
            BackendError: Some commands failed, and no server is known to work.
        """
        self._check_open()
        replies: list[Any] = [None] * len(commands)
        routes: dict[int, Elsewhere] = {}
        for position, (_, key, *_) in enumerate(commands):
            owner = self._topology.owner(key)
            if owner is None:
                self._gone_lost_keys += 1
                replies[position] = BackendUnavailable("no server of the redis cluster owns this key's slot")
            else:
                routes[position] = Elsewhere(owner, asking=False)
        for _ in range(_MAX_HOPS):
            groups: dict[Elsewhere, list[int]] = defaultdict(list)
            for position, route in routes.items():
                groups[route].append(position)
            answers = await asyncio.gather(
                *(
                    self._shard(route.address).ask(
                        [commands[position] for position in positions],
                        timeout_s=timeout_s,
                        asking=route.asking,
                    )
                    for route, positions in groups.items()
                )
            )
            routes.clear()
            for positions, answer in zip(groups.values(), answers, strict=True):
                for position, reply in zip(positions, answer, strict=True):
                    if isinstance(reply, Elsewhere):
                        routes[position] = reply
                    else:
                        replies[position] = reply
            if not routes:
                break
        for position, route in routes.items():
            self._gone_lost_keys += 1
            replies[position] = BackendUnavailable(f"redis at {route.address} sends a key elsewhere again")
        self._check(replies)
        return replies

    def _check(self, replies: Sequence[Any]) -> None:
        """Raise what went wrong, unless some server still works."""
        if len(self._shards) == 1 or all(shard.breaker.last_failed for shard in self._shards.values()):
            for reply in replies:
                if isinstance(reply, BackendError) and not isinstance(reply, BackendFull | BackendBusy):
                    raise reply

    async def _unlink_matching(self, shard: Shard, pattern: str) -> int:
        cursor, num_removed = 0, 0
        while True:
            cursor, found = await shard.scan(
                cursor, match=pattern, count=_SCAN_KEYS, timeout_s=self._limits.timeout_s
            )
            removed = await self._send([(b"UNLINK", key) for key in found], self._limits.timeout_s)
            num_removed += sum(reply for reply in _found(removed) if isinstance(reply, int))
            if cursor == 0:
                return num_removed

    async def _learn(self) -> None:
        """Find out who owns which key, and let go of servers that own none."""
        async with self._learning:
            await self._topology.refresh()
            primaries = self._topology.primaries
            for address in primaries:
                self._shard(address)
            for address in self._shards.keys() - primaries:
                shard = self._shards.pop(address)
                stats = shard.stats()
                self._gone_failed_calls += stats.failed_calls
                self._gone_lost_keys += stats.lost_keys
                _log.info("redis at %s owns no keys any more", address)
                await shard.retire()

    async def _greet(self) -> None:
        """Probe all servers, and say what in their settings will hurt.

        Raises:
            BackendError: None answers.
        """
        shards = list(self._shards.values())
        answers = await asyncio.gather(
            *(shard.probe(self._limits.timeout_s) for shard in shards), return_exceptions=True
        )
        _found([answer for answer in answers if not isinstance(answer, BackendError)] or answers)
        for shard in shards:
            with suppress(BackendError):
                facts = await shard.facts(self._limits.timeout_s)
                for sentence in advice(facts, has_ttl=self._limits.ttl_s is not None):
                    _log.warning("redis at %s: %s", shard.address, sentence)

    async def _watch(self) -> None:
        """Follow the arrangement: at once when something is wrong, otherwise now and then."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._trouble.wait()
            self._trouble.clear()
            try:
                await self._learn()
            except BackendError as error:
                _log.info("%s", error)
            await asyncio.gather(*(self._probe(shard) for shard in self._shards.values()))
            await asyncio.sleep(_PROBE_PAUSE_S)

    async def _probe(self, shard: Shard) -> None:
        if shard.breaker.is_open:
            with suppress(BackendError):
                await shard.probe(self._limits.lookup_timeout_s)

    async def _count(self, rest_s: float) -> None:
        while True:
            await self._census.take(list(self._shards.values()), timeout_s=self._limits.timeout_s)
            await asyncio.sleep(rest_s)


def _redis_key(key: BlockKey) -> bytes:
    namespace, prefix = split_key(key)
    return f"{_BLOCKS}:{namespace.hex()}:{prefix.hex()}".encode()


def _outcome(reply: Any) -> PutOutcome:
    if isinstance(reply, BackendError):
        return PutOutcome.REFUSED
    return PutOutcome.PRESENT if reply is None else PutOutcome.STORED


def _found(answers: Sequence[_T | BaseException]) -> list[_T]:
    """The answers, if none is an error; otherwise raises the first."""
    found = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        found.append(answer)
    return found
