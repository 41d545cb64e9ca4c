"""The servers of the Redis tier together: each command to its key's owner, and a watch over all of them."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from tq_store.backends.redis_advice import advice
from tq_store.backends.redis_shard import Command, Elsewhere, Shard
from tq_store.backends.redis_target import Address, RedisTarget
from tq_store.backends.redis_topology import topology_of
from tq_store.errors import BackendBusy, BackendError, BackendFull, BackendUnavailable
from tq_store.results import ShardStats

_T = TypeVar("_T")

_MAX_HOPS = 3
_WATCH_S = 30.0
"""How often the arrangement is looked at when nothing is wrong."""
_PROBE_PAUSE_S = 0.5
_GONE = "gone"

_log = logging.getLogger(__name__)


class RedisServers:
    """Knows who owns which key, asks all owners at once, and notices who fails and who takes over.

    Args:
        target: What to connect to.
        probe_timeout_s: Deadline of each question of the watch.
    """

    def __init__(self, target: RedisTarget, *, probe_timeout_s: float) -> None:
        self._target = target
        self._probe_timeout_s = probe_timeout_s
        self._topology = topology_of(target, probe_timeout_s)
        self._shards: dict[Address, Shard] = {}
        self._gone_failed_calls = self._gone_lost_keys = 0
        self._trouble = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def open(self, *, timeout_s: float, has_ttl: bool) -> None:
        """Learn who owns which key, ask for a sign of life, say what in the settings will hurt; then watch.

        Raises:
            BackendError: Nobody answers.
        """
        await self._learn()
        shards = self.shards
        await self.ask_all([shard.probe(timeout_s) for shard in shards])
        for shard in shards:
            with suppress(BackendError):
                for sentence in advice(await shard.facts(timeout_s), has_ttl=has_ttl):
                    _log.warning("redis at %s: %s", shard.address, sentence)
        self._watcher = asyncio.create_task(self._watch())

    @property
    def shards(self) -> list[Shard]:
        """All that own keys."""
        return list(self._shards.values())

    def owner(self, key: bytes) -> Shard | None:
        """The server that owns a key, or None while none does."""
        address = self._topology.owner(key)
        return None if address is None else self._shard(address)

    def stats(self) -> list[ShardStats]:
        """How each server has behaved; ``gone`` sums up those that own keys no more."""
        gone = ShardStats(
            name=_GONE,
            is_open=False,
            failed_calls=self._gone_failed_calls,
            lost_keys=self._gone_lost_keys,
        )
        stats = [shard.stats() for shard in self._shards.values()]
        return [*stats, gone] if gone.failed_calls or gone.lost_keys else stats

    async def send(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """One reply per command, or the error for want of which there is none; each goes to its key's owner.

        Raises:
            BackendError: Some commands failed, and no server is known to work.
        """
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
        self.raise_if_all_fail(replies)
        return replies

    def raise_if_all_fail(self, replies: Sequence[Any]) -> None:
        """Raise what went wrong, unless some server still works."""
        if len(self._shards) == 1 or all(shard.breaker.last_failed for shard in self._shards.values()):
            for reply in replies:
                if isinstance(reply, BackendError) and not isinstance(reply, BackendFull | BackendBusy):
                    raise reply

    async def ask_all(self, questions: Sequence[Awaitable[_T]]) -> list[_T]:
        """The answers of those that answer.

        Raises:
            BackendError: None does.
        """
        answers = await asyncio.gather(*questions, return_exceptions=True)
        return all_answers([answer for answer in answers if not isinstance(answer, BackendError)] or answers)

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        for shard in self.shards:
            await shard.close()
        await self._topology.close()

    def _shard(self, address: Address) -> Shard:
        if address not in self._shards:
            self._shards[address] = Shard(address, self._target, self._trouble.set)
        return self._shards[address]

    async def _learn(self) -> None:
        """Find out who owns which key, and let go of servers that own none."""
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
            except Exception:
                # whatever it was, without the watch a breaker that is open would stay so
                _log.exception("the redis tier's watch met something unexpected")
            await asyncio.gather(*(self._probe(shard) for shard in self.shards))
            await asyncio.sleep(_PROBE_PAUSE_S)

    async def _probe(self, shard: Shard) -> None:
        if shard.breaker.is_open:
            with suppress(BackendError):
                await shard.probe(self._probe_timeout_s)


def all_answers(answers: Sequence[_T | BaseException]) -> list[_T]:
    """The answers, if none is an error; otherwise raises the first that is."""
    sound = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        sound.append(answer)
    return sound
