"""One server of the Redis tier: its round trips, and whether it works well enough to be asked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from redis.exceptions import AskError, ExecAbortError, MovedError, OutOfMemoryError, ResponseError

from tq_store.backends.breaker import Breaker
from tq_store.backends.redis_link import Link
from tq_store.backends.redis_target import Address, RedisTarget
from tq_store.errors import BackendBusy, BackendError, BackendFull, BackendUnavailable
from tq_store.results import ShardStats

Command = tuple[bytes, ...]
"""A command's name, its key, and what else it takes."""

_ROUND_TRIP_BYTES = 16 << 20
_TRANSFERS = 16
_LOOKUPS = 8
_OTHERS = 4
"""Connections for what an operator or the watch asks, whoever else waits."""
_INLINE_BYTES = 4096
_FETCHES = (b"GET", b"GETEX")
_MOVERS = (*_FETCHES, b"SET")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A reply that names the server to ask instead.

    Args:
        address: That server.
        asking: Whether it must be told that the key is still on its way to it.
    """

    address: Address
    asking: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself, which includes keys and overhead that are not ours."""

    num_keys: int
    used_bytes: int
    max_bytes: int
    evicted_keys: int
    eviction_policy: str


class Shard:
    """Sends commands to one server and answers for what becomes of them.

    A round trip carries at most 16 MiB of blocks or a single block, and leaves no half-read reply behind when
    it is cancelled. It fails when nothing is heard for its deadline: a slow link is no dead server. Nor is a
    busy one: commands beyond the connections wait for one as long, and are then lost without counting as
    failures. While the breaker is open, nothing is sent but probes.

    Args:
        address: The server.
        target: How to get in.
        on_trouble: Called when a call fails, and when a reply says that keys have moved.
    """

    def __init__(self, address: Address, target: RedisTarget, on_trouble: Callable[[], None]) -> None:
        self.address = address
        self.breaker = Breaker()
        self._link = Link(address, target, max_connections=_TRANSFERS + _LOOKUPS + _OTHERS)
        self._transfers = asyncio.Semaphore(_TRANSFERS)
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        self._on_trouble = on_trouble
        self._block_bytes = 4 << 20
        self._failed_calls = self._lost_keys = 0
        self._is_retired = False

    def stats(self) -> ShardStats:
        """How it has behaved."""
        return ShardStats(
            name=str(self.address),
            is_open=self.breaker.is_open,
            failed_calls=self._failed_calls,
            lost_keys=self._lost_keys,
        )

    async def ask(self, commands: Sequence[Command], *, timeout_s: float, asking: bool = False) -> list[Any]:
        """One reply per command: a value, `Elsewhere`, or the `BackendError` for want of which it is lost.

        Errors are values, so that a caller with several servers goes on with the others.

        Args:
            commands: Each on one key.
            timeout_s: Longest wait for a connection, for connecting, and for each reply.
            asking: See `Elsewhere`.
        """
        replies: list[Any] = []
        while len(replies) < len(commands):
            group = commands[len(replies) : _end_of_round_trip(commands, len(replies), self._block_bytes)]
            try:
                async with self._turn(group, timeout_s), self._round_trip(timeout_s) as extend:
                    answers = await self._exchange(group, asking, extend)
                    replies += [self._meaning(answer) for answer in answers]
            except BackendError as error:
                num_lost = len(commands) - len(replies)
                self._lost_keys += num_lost
                return replies + [error] * num_lost
        return replies

    async def scan(self, cursor: int, *, match: str, count: int, timeout_s: float) -> tuple[int, list[bytes]]:
        """The next cursor and some keys.

        Raises:
            BackendError: It failed, or is left alone.
        """
        async with self._round_trip(timeout_s):
            return cast(
                tuple[int, list[bytes]], await self._link.client.scan(cursor, match=match, count=count)
            )

    async def sizes(self, keys: Sequence[bytes], *, timeout_s: float) -> list[int]:
        """Bytes of the values; 0 for one that is gone or is no string.

        Raises:
            BackendError: It failed, or is left alone.
        """
        async with self._round_trip(timeout_s):
            pipeline = self._link.client.pipeline(transaction=False)
            for key in keys:
                pipeline.strlen(key)
            replies = await pipeline.execute(raise_on_error=False)
        return [reply if isinstance(reply, int) else 0 for reply in replies]

    async def facts(self, timeout_s: float) -> ServerFacts:
        """What the server says of itself.

        Raises:
            BackendError: It failed, or is left alone.
        """
        async with self._round_trip(timeout_s):
            pipeline = self._link.client.pipeline(transaction=False)
            pipeline.dbsize()
            pipeline.info("memory")
            pipeline.info("stats")
            num_keys, memory, counters = await pipeline.execute()
        return ServerFacts(
            num_keys=num_keys,
            used_bytes=memory["used_memory"],
            max_bytes=memory["maxmemory"],
            evicted_keys=counters["evicted_keys"],
            eviction_policy=memory["maxmemory_policy"],
        )

    async def probe(self, timeout_s: float) -> None:
        """Ask for a sign of life, open breaker or not; one that comes closes it.

        Raises:
            BackendError: None came.
        """
        was_open = self.breaker.is_open
        async with self._counted(), self._link.round_trip(timeout_s):
            await self._link.client.ping()
        self.breaker.close()
        if was_open:
            _log.info("%s answers again", self._link.where)

    async def retire(self) -> None:
        """Let calls under way end, then hold no connections: the server owns no keys any more."""
        self._is_retired = True
        await self._link.close(in_use=False)

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        await self._link.close()

    @asynccontextmanager
    async def _turn(self, commands: Sequence[Command], timeout_s: float) -> AsyncIterator[None]:
        """Wait until few enough others are at it; what moves no blocks does not wait for what does."""
        turns = self._transfers if commands[0][0] in _MOVERS else self._lookups
        try:
            async with asyncio.timeout(timeout_s):
                await turns.acquire()
        except TimeoutError as error:
            raise BackendBusy(f"{self._link.where} has too much to do") from error
        try:
            yield
        finally:
            turns.release()

    @asynccontextmanager
    async def _round_trip(self, timeout_s: float) -> AsyncIterator[Callable[[], None]]:
        if self.breaker.is_open:
            raise BackendUnavailable(f"{self._link.where} failed too often and is left alone for now")
        async with self._counted(), self._link.round_trip(timeout_s) as extend:
            yield extend

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Tell the breaker how a call ends; one that is cancelled says nothing about the server."""
        try:
            yield
        except BackendError as error:
            self._failed_calls += 1
            if self.breaker.failed():
                _log.warning("left alone until it answers a probe: %s", error)
            self._on_trouble()
            raise
        self.breaker.succeeded()

    async def _exchange(
        self, commands: Sequence[Command], asking: bool, extend: Callable[[], None]
    ) -> list[Any]:
        """Send commands at once and read their replies; refusals are values here."""
        pool = self._link.pool
        connection = await pool.get_connection()
        try:
            for chunk in _packed(commands, asking):
                # one by one: together they would be joined, which copies the blocks
                await connection.send_packed_command([chunk])
                extend()
            replies: list[Any] = []
            for _ in range(len(commands) * (2 if asking else 1)):
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
                extend()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            if self._is_retired:
                await connection.disconnect(nowait=True)
            await pool.release(connection)
        if asking:
            replies = replies[1::2]
        if commands[0][0] in _FETCHES:
            # sizes are known only afterwards, but seldom change: the last ones seen are the estimate
            fetched = [len(reply) for reply in replies if isinstance(reply, bytes)]
            self._block_bytes = max(fetched, default=self._block_bytes)
        return replies

    def _meaning(self, reply: Any) -> Any:
        if not isinstance(reply, ResponseError):
            return reply
        if isinstance(reply, AskError):
            self._on_trouble()
            moved_to = Address(reply.host or self.address.host, reply.port)
            return Elsewhere(moved_to, asking=not isinstance(reply, MovedError))
        if isinstance(reply, OutOfMemoryError):
            return BackendFull(
                f"{self._link.where} is full: raise its maxmemory or set maxmemory-policy to allkeys-lfu"
            )
        if isinstance(reply, ExecAbortError) or str(reply).startswith("WRONGTYPE"):
            return None
        raise reply


def _end_of_round_trip(commands: Sequence[Command], start: int, block_bytes: int) -> int:
    """Where a round trip ends that begins at `start`: at 16 MiB of values, but not before its first command.

    Args:
        commands: All commands.
        start: How many of them are done.
        block_bytes: What a block that is fetched is expected to have.
    """
    total_bytes = 0
    for end in range(start, len(commands)):
        command = commands[end]
        # all that is large in a command is the value, at the third place
        total_bytes += block_bytes if command[0] in _FETCHES else sum(map(len, command[2:3]))
        if total_bytes > _ROUND_TRIP_BYTES and end > start:
            return end
    return len(commands)


def _packed(commands: Sequence[Command], asking: bool) -> list[bytes]:
    """Commands as the server reads them; blocks are passed on, not copied."""
    chunks: list[bytes] = []
    head = bytearray()
    for command in commands:
        if asking:
            head += b"*1\r\n$6\r\nASKING\r\n"
        head += b"*%d\r\n" % len(command)
        for part in command:
            head += b"$%d\r\n" % len(part)
            if len(part) > _INLINE_BYTES:
                chunks += [bytes(head), part]
                head = bytearray(b"\r\n")
            else:
                head += part + b"\r\n"
    return [*chunks, bytes(head)]
