"""Blocks in a Redis or Valkey server: one key per block, pipelined; the only file that imports redis."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tq_store.errors import BackendError, BackendFull, BackendTimeout, BackendUnavailable, ConfigError
from tq_store.keys import BlockKey, split_key
from tq_store.results import BackendStats, PutOutcome

_BLOCKS = "tq:1"
_QUARANTINE = "tq:quarantine:1"
_QUARANTINE_TTL_S = 24 * 3600
_CONNECTIONS = 16
_ROUND_TRIP_BYTES = 16 << 20
_SCAN_KEYS = 1000


class RedisBackend:
    """Blocks under ``tq:1:<namespace hex>:<prefix hex>``, header and payload in one value.

    Made by `open`. The server keeps the budget and evicts by its own `maxmemory-policy`. Corrupt blocks are
    renamed to ``tq:quarantine:1:…`` for a day. Every round trip has the deadline of `timeout_s`, carries at
    most 16 MiB of blocks or a single block, and leaves no half-read reply behind when it is cancelled.
    """

    def __init__(self, url: str, *, timeout_s: float, ttl_s: int | None) -> None:
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._block_bytes = 4 << 20
        self._closed = False
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=None,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
        )
        self._client = Redis.from_pool(pool)
        options = pool.connection_kwargs
        self._where = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        self._password: str | None = options.get("password")

    @classmethod
    async def open(cls, url: str, *, timeout_s: float = 2.0, ttl_s: int | None = None) -> "RedisBackend":
        """Connect and ask for a sign of life.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``, with credentials and database if need be.
            timeout_s: Deadline of each round trip, connecting included.
            ttl_s: Lifetime of a block after its put; None leaves it to the server's eviction.

        Raises:
            ConfigError: The URL or a number is not usable.
            BackendError: The server does not answer or turns us away.
        """
        if timeout_s <= 0 or (ttl_s is not None and ttl_s < 1):
            raise ConfigError(
                f"the redis tier needs timeout_s above 0 and ttl_s of at least 1, not {timeout_s} and {ttl_s}"
            )
        try:
            backend = cls(url, timeout_s=timeout_s, ttl_s=ttl_s)
        except (ValueError, TypeError):
            # the cause may quote parts of the URL, and with them a password
            raise ConfigError(
                "the URL of the redis tier must read redis://[user:password@]host[:port][/database], "
                "with special characters in the password percent-encoded"
            ) from None
        try:
            async with backend._round_trip():
                await backend._client.ping()
        except BaseException:
            await backend.close()
            raise
        return backend

    @property
    def name(self) -> str:
        """Short name for metrics and logs."""
        return "redis"

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are there, in one round trip."""
        return [found == 1 for found in await self._each("EXISTS", keys)]

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Fetch blocks in as many round trips as their bytes ask for."""
        self._check_open()
        blocks: list[bytes | None] = []
        while len(blocks) < len(keys):
            # sizes are known only afterwards, but seldom change: the last ones seen are the estimate
            num_keys = max(1, _ROUND_TRIP_BYTES // self._block_bytes)
            asked = [_redis_key(key) for key in keys[len(blocks) : len(blocks) + num_keys]]
            async with self._round_trip():
                found = cast(list[bytes | None], await self._client.mget(asked))
            blocks += found
            self._block_bytes = max(map(len, filter(None, found)), default=self._block_bytes)
        return blocks

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Set what is not there yet; if the server runs out of memory, the blocks before stay.

        Raises:
            BackendFull: The server is at `maxmemory` and may not evict.
        """
        self._check_open()
        outcomes = []
        for group in _round_trips(blocks):
            async with self._round_trip():
                pipeline = self._client.pipeline(transaction=False)
                for key, block in group:
                    pipeline.set(_redis_key(key), block, nx=True, ex=self._ttl_s)
                replies = await pipeline.execute()
            outcomes += [PutOutcome.STORED if stored else PutOutcome.PRESENT for stored in replies]
        return outcomes

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Unlink blocks; the server frees the memory in the background."""
        return [removed == 1 for removed in await self._each("UNLINK", keys)]

    async def quarantine(self, key: BlockKey) -> None:
        """Rename a block out of the way; the server forgets it after a day."""
        aside = _redis_key(key, _QUARANTINE)
        async with self._round_trip():
            pipeline = self._client.pipeline(transaction=True)
            pipeline.rename(_redis_key(key), aside)
            pipeline.expire(aside, _QUARANTINE_TTL_S)
            # refusals end the transaction and raise; what can fail within it is only a key that is gone
            await pipeline.execute(raise_on_error=False)

    async def purge(self, namespace: bytes | None = None) -> int:
        """Scan for the keys of a namespace digest, or all of tq-store's, and unlink them page by page.

        Quarantined blocks go too, but do not count.
        """
        suffix = "*" if namespace is None else f"{namespace.hex()}:*"
        await self._unlink_matching(f"{_QUARANTINE}:{suffix}")
        return await self._unlink_matching(f"{_BLOCKS}:{suffix}")

    async def stats(self) -> BackendStats:
        """What the server says of itself, which includes keys and overhead that are not ours.

        Counting our own blocks would mean to scan them.
        """
        async with self._round_trip():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.dbsize()
            pipeline.info("memory")
            pipeline.info("stats")
            num_keys, memory, counters = await pipeline.execute()
        return BackendStats(
            num_blocks=num_keys,
            used_bytes=memory["used_memory"],
            budget_bytes=memory["maxmemory"] or None,
            evicted_blocks=counters["evicted_keys"],
        )

    async def close(self) -> None:
        """Close all connections; calls under way fail with BackendUnavailable."""
        self._closed = True
        await self._client.aclose(close_connection_pool=True)

    def _check_open(self) -> None:
        if self._closed:
            raise BackendUnavailable("the redis tier is closed")

    async def _each(self, command: str, keys: Sequence[BlockKey]) -> list[int]:
        """Replies to one command per key, in one round trip."""
        self._check_open()
        if not keys:
            return []
        async with self._round_trip():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.execute_command(command, _redis_key(key))
            replies: list[int] = await pipeline.execute()
        return replies

    async def _unlink_matching(self, pattern: str) -> int:
        cursor, num_removed = 0, 0
        while True:
            async with self._round_trip():
                cursor, page = await self._client.scan(cursor, match=pattern, count=_SCAN_KEYS)
            if page:
                async with self._round_trip():
                    num_removed += await self._client.unlink(*page)
            if cursor == 0:
                return num_removed

    @asynccontextmanager
    async def _round_trip(self) -> AsyncIterator[None]:
        """Put a deadline on what happens inside, and translate what goes wrong."""
        self._check_open()
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (RedisError, OSError) as error:
            # a server that does not know AUTH repeats its arguments
            leaks = self._password is not None and self._password in str(error)
            raise self._translated(error) from (None if leaks else error)

    def _translated(self, error: Exception) -> BackendError:
        server = f"redis at {self._where}"
        if isinstance(error, (TimeoutError, RedisTimeoutError)):
            return BackendTimeout(f"{server} did not answer within {self._timeout_s} s")
        if isinstance(error, OutOfMemoryError):
            return BackendFull(
                f"{server} is full: raise its maxmemory or set maxmemory-policy to allkeys-lfu"
            )
        reason = str(error).replace(self._password or "\0", "***")
        return BackendUnavailable(f"{server} does not work: {reason}")


def _redis_key(key: BlockKey, folder: str = _BLOCKS) -> str:
    namespace, prefix = split_key(key)
    return f"{folder}:{namespace.hex()}:{prefix.hex()}"


def _round_trips(blocks: Sequence[tuple[BlockKey, bytes]]) -> Iterator[list[tuple[BlockKey, bytes]]]:
    """Cut a batch into groups of at most `_ROUND_TRIP_BYTES`, or one block."""
    group: list[tuple[BlockKey, bytes]] = []
    group_bytes = 0
    for key, block in blocks:
        if group and group_bytes + len(block) > _ROUND_TRIP_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append((key, block))
        group_bytes += len(block)
    if group:
        yield group
