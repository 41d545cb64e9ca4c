"""Which server owns which key: a single server, the master that sentinels name, or a cluster's slots."""

import random
from typing import Any, Protocol

from redis.asyncio.sentinel import Sentinel
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from tq_store.backends.redis_link import Credentials, Link, connection_options
from tq_store.backends.redis_target import Address, Arrangement, RedisTarget
from tq_store.errors import BackendError, BackendUnavailable


class Topology(Protocol):
    """Who owns the keys, as last learnt. Holds no blocks and no connections that carry any."""

    @property
    def primaries(self) -> frozenset[Address]:
        """All servers that own keys."""

    def owner(self, key: bytes) -> Address | None:
        """The server that owns a key, or None while none does."""

    async def refresh(self) -> None:
        """Learn anew.

        Raises:
            BackendError: Nobody could be asked; what was known stays.
        """

    async def close(self) -> None:
        """Release everything."""


def topology_of(target: RedisTarget, timeout_s: float) -> Topology:
    """The topology that fits a target; it knows nothing before its first `refresh`.

    Args:
        target: What to connect to.
        timeout_s: Deadline of each question to a node or a sentinel.
    """
    if target.arrangement is Arrangement.CLUSTER:
        return _Cluster(target, timeout_s)
    if target.arrangement is Arrangement.SENTINEL:
        return _Sentinels(target, timeout_s)
    return _Standalone(target.addresses[0])


class _OneServer:
    """A topology in which one server owns all keys."""

    def __init__(self) -> None:
        self._address: Address | None = None

    @property
    def primaries(self) -> frozenset[Address]:
        return frozenset() if self._address is None else frozenset([self._address])

    def owner(self, _: bytes) -> Address | None:
        return self._address


class _Standalone(_OneServer):
    def __init__(self, address: Address) -> None:
        super().__init__()
        self._address = address

    async def refresh(self) -> None:
        """Nothing to learn."""

    async def close(self) -> None:
        """Nothing to release."""


class _Sentinels(_OneServer):
    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        super().__init__()
        self._service = target.service
        self._timeout_s = timeout_s
        self._credentials = Credentials(target.sentinel_login)
        options = connection_options(target, self._credentials)
        self._sentinel = Sentinel(
            target.addresses,
            sentinel_kwargs={
                **options,
                "ssl": target.uses_tls,
                "retry": None,
                "socket_timeout": timeout_s,
                "socket_connect_timeout": timeout_s,
            },
        )

        # it reorders its own list, the sentinel that answered first
        self._clients = list(zip(target.addresses, self._sentinel.sentinels, strict=True))

    async def refresh(self) -> None:
        try:
            host, port = await self._sentinel.discover_master(self._service)
        except (RedisError, OSError) as error:
            # its text shows the whole client, and seldom the reason
            reason = await self._complaint()
            raise BackendUnavailable(
                f"no sentinel names a master called {self._service!r} that works{reason}"
            ) from (None if self._credentials.are_in(str(error)) else error)
        self._address = Address(host, port)

    async def _complaint(self) -> str:
        """What is wrong with the first sentinel that does not answer."""
        for address, sentinel in self._clients:
            try:
                await sentinel.ping()
            except (RedisError, OSError) as error:
                return f": {self._credentials.translated(error, f'sentinel at {address}', self._timeout_s)}"
        return ""

    async def close(self) -> None:
        for _, sentinel in self._clients:
            await sentinel.aclose()


class _Cluster:
    """Reads the slots and nothing else.

    redis-py's own cluster client is not used for blocks: its pipelines retry a node that fails before they
    answer for the others, so that one dead master would hold up every call.
    """

    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._slots: list[Address | None] = []
        self._primaries: frozenset[Address] = frozenset()
        self._nodes: set[Address] = set()

    @property
    def primaries(self) -> frozenset[Address]:
        return self._primaries

    def owner(self, key: bytes) -> Address | None:
        return self._slots[key_slot(key)]

    async def refresh(self) -> None:
        known = list(self._nodes.difference(self._target.addresses))
        seeds = list(self._target.addresses)
        # in no fixed order, so that one node with an old view is not asked again and again
        random.shuffle(known)
        random.shuffle(seeds)
        errors = []
        for address in (*known, *seeds):
            try:
                ranges = await self._ask(address)
            except BackendError as error:
                errors.append(error)
                continue
            if ranges:
                self._learn(ranges, asked=address)
                return
        raise BackendUnavailable(
            f"no node of the redis cluster tells its slots: {errors[-1] if errors else 'none has any'}"
        )

    async def close(self) -> None:
        """Nothing to release."""

    async def _ask(self, address: Address) -> list[Any]:
        link = Link(address, self._target, max_connections=1)
        try:
            async with link.round_trip(self._timeout_s):
                reply: list[Any] = await link.client.execute_command("CLUSTER", "SLOTS")
                return reply
        finally:
            await link.close()

    def _learn(self, ranges: list[Any], *, asked: Address) -> None:
        """Take over what a node said: ``[first slot, last slot, [host, port, …] of the master, replicas…]``.

        A node that does not know its own name leaves it empty.
        """
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        nodes: set[Address] = set()
        for first, last, *members in ranges:
            addresses = [Address(host.decode() if host else asked.host, port) for host, port, *_ in members]
            slots[first : last + 1] = [addresses[0]] * (last + 1 - first)
            nodes.update(addresses)
        self._slots = slots
        self._primaries = frozenset(address for address in slots if address is not None)
        self._nodes = nodes
