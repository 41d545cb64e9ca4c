"""Several tiers as one store: look down, copy up, write behind, load each block once at a time."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tq_store.backends.base import Backend
from tq_store.block import verify_block
from tq_store.errors import BackendError, ConfigError
from tq_store.keys import DIGEST_BYTES, BlockKey
from tq_store.results import BackendStats, PutOutcome, QueueStats, ShardStats
from tq_store.tiering.tier import Tier, Verify, Watch, check_all, unwatched

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What the store holds and what it has done since it was made.

    Args:
        tiers: By tier name, from the top; a tier that fails to answer is left out.
        counters: ``hits_<tier>`` and ``misses`` (distinct keys of a get, those that joined a load not
            included), ``joined_loads``, ``promotions``, ``quarantined``, ``unsupported`` (read, but of a
            version or with features that only newer servers know), ``dropped_writes`` (lower tiers: queue
            full, tier failing or refusing), ``refused`` and ``invalid`` (blocks of a put),
            ``tier_errors_<tier>`` (calls that failed).
        shards: By tier name, the servers of those tiers that are made of servers, whether they answer or not.
        queues: By lower tier's name, what waits to be written there.
    """

    tiers: Mapping[str, BackendStats]
    counters: Mapping[str, int]
    shards: Mapping[str, Sequence[ShardStats]] = field(default_factory=dict)
    queues: Mapping[str, QueueStats] = field(default_factory=dict)


class TieredStore:
    """The blocks of all tiers, the fastest first.

    Called by the service on its event loop; no method blocks it. No method but `purge` raises for a failing
    tier: reads miss, writes are dropped, both counted. Blocks are checked when they come in, and again when
    they come from a medium outside this process; so what a get returns is sound.

    Args:
        tiers: Backends with distinct names, from the top; the store owns and closes them.
        write_queue_bytes: Per lower tier, the blocks that may wait to be written; more are dropped.
        clock: Seconds, monotonic; decides when a failing tier is tried again.
        watch: Wraps each call to a tier's medium, to measure and to trace it.
        verify: Raises BlockFormatError for a block that is not sound, or not of its key.
        coded: Names of the lower tiers in which blocks are kept compressed.

    Raises:
        ConfigError: No tier, or two of one name.
    """

    def __init__(
        self,
        tiers: Sequence[Backend],
        *,
        write_queue_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
        watch: Watch = unwatched,
        verify: Verify = verify_block,
        coded: Collection[str] = (),
    ) -> None:
        self._verify = verify
        names = [tier.name for tier in tiers]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a store needs tiers with distinct names, at least one; these are {names}")
        self._counters = Counter(
            dict.fromkeys(
                [f"hits_{name}" for name in names]
                + ["misses", "joined_loads", "promotions", "quarantined", "unsupported", "dropped_writes"]
                + ["refused", "invalid"]
                + [f"tier_errors_{name}" for name in names],
                0,
            )
        )
        self._tiers = [
            Tier(
                tier,
                queue_bytes=write_queue_bytes,
                counters=self._counters,
                clock=clock,
                watch=watch,
                verify=verify,
                coded=tier.name in coded,
            )
            for tier in tiers
        ]
        self._loads: dict[BlockKey, asyncio.Future[bytes | None]] = {}
        self._load_tasks: set[asyncio.Task[None]] = set()

    async def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are in some tier."""
        found = [False] * len(keys)
        for tier in self._tiers:
            missing = [position for position, there in enumerate(found) if not there]
            there = await tier.contains([keys[position] for position in missing])
            for position, here in zip(missing, there, strict=True):
                found[position] = here
        return found

    async def lookup(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the first on are there without a gap."""
        return [*await self.contains(keys), False].index(False)

    def sizes_at_hand(self, keys: Sequence[BlockKey]) -> list[int]:
        """Lengths of the leading blocks that a get would find in memory, and so wait for nothing."""
        return self._tiers[0].sizes_at_hand(keys)

    async def get(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Blocks, or None for a miss; those found below are copied to the top.

        A block that another get is loading is waited for, not loaded again. A caller that goes away does not
        end a load that it began, so others may rely on it.
        """
        unique = list(dict.fromkeys(keys))
        blocks = dict(zip(unique, await self._tiers[0].get(unique), strict=True))
        missing = [key for key, block in blocks.items() if block is None]
        self._counters[f"hits_{self._tiers[0].name}"] += len(unique) - len(missing)
        new = [key for key in missing if key not in self._loads]
        self._counters["joined_loads"] += len(missing) - len(new)
        if new:
            self._loads |= {key: asyncio.get_running_loop().create_future() for key in new}
            task = asyncio.create_task(self._load(new))
            self._load_tasks.add(task)
            task.add_done_callback(self._load_tasks.discard)
        if missing:
            loads = {key: self._loads[key] for key in missing}
            await asyncio.wait(loads.values())
            blocks |= {key: load.result() for key, load in loads.items()}
        return [blocks[key] for key in keys]

    async def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        """Check blocks, store them in the top tier now and in the others later.

        The outcome is the top tier's; INVALID for a block that is not sound or not of its key.
        """
        errors = await check_all(blocks, self._verify)
        sound = [block for block, error in zip(blocks, errors, strict=True) if error is None]
        stored = iter(await self._tiers[0].put(sound))
        for tier in self._tiers[1:]:
            tier.put_later(sound)
        outcomes = [PutOutcome.INVALID if error else next(stored) for error in errors]
        self._counters["invalid"] += outcomes.count(PutOutcome.INVALID)
        self._counters["refused"] += outcomes.count(PutOutcome.REFUSED)
        return outcomes

    async def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Remove blocks from every tier; True where any tier had one."""
        doomed = set(keys)
        removed = await self._remove(doomed.__contains__, lambda tier: tier.delete(keys))
        return [any(tiers) for tiers in zip(*removed, strict=True)]

    async def purge(self, namespace: bytes | None) -> int:
        """Remove a namespace from every tier, or everything; returns how many copies.

        Raises:
            ValueError: Not a namespace digest.
            BackendError: A tier failed and may still hold blocks; the others were purged.
        """
        if namespace is not None and len(namespace) != DIGEST_BYTES:
            raise ValueError(f"a namespace digest has {DIGEST_BYTES} bytes, not {len(namespace)}")
        removed = await self._remove(
            lambda key: namespace is None or key.startswith(namespace),
            lambda tier: tier.purge(namespace),
        )
        failed = [
            tier.name for tier, copies in zip(reversed(self._tiers), removed, strict=True) if copies is None
        ]
        if failed:
            raise BackendError(
                f"the purge is incomplete: the {' and '.join(failed)} tier failed and may still hold blocks; "
                f"purge again when it works"
            )
        return sum(copies or 0 for copies in removed)

    async def stats(self) -> StoreStats:
        """What is held and what was done."""
        stats = {tier.name: await tier.stats() for tier in self._tiers}
        return StoreStats(
            tiers={name: held for name, held in stats.items() if held is not None},
            counters=dict(self._counters),
            shards={tier.name: shards for tier in self._tiers if (shards := tier.shards())},
            queues={tier.name: tier.queue for tier in self._tiers[1:]},
        )

    async def flush(self) -> None:
        """Wait for the loads under way and for all writes that were put off."""
        if self._load_tasks:
            await asyncio.wait(self._load_tasks)
        for tier in self._tiers:
            await tier.flush()

    async def close(self) -> None:
        """Flush, then close the tiers; from then on everything misses."""
        await self.flush()
        for tier in self._tiers:
            await tier.close()

    async def _load(self, keys: Sequence[BlockKey]) -> None:
        """Resolve the loads of these keys from the lower tiers."""
        missing = dict.fromkeys(keys)
        try:
            for level, tier in enumerate(self._tiers[1:], 1):
                blocks = dict(zip(missing, await tier.get(list(missing)), strict=True))
                found = [(key, block) for key, block in blocks.items() if block is not None]
                self._counters[f"hits_{tier.name}"] += len(found)
                await self._promote(found, level)
                for key, block in found:
                    del missing[key]
                    self._loads.pop(key).set_result(block)
        finally:
            self._counters["misses"] += len(missing)
            for key in missing:
                self._loads.pop(key).set_result(None)

    async def _promote(self, blocks: Sequence[tuple[BlockKey, bytes]], level: int) -> None:
        """Copy blocks to the tiers above a level: to the top now, to those between later."""
        outcomes = await self._tiers[0].put(blocks)
        self._counters["promotions"] += outcomes.count(PutOutcome.STORED)
        for tier in self._tiers[1:level]:
            tier.put_later(blocks)

    async def _remove(
        self, doomed: Callable[[BlockKey], bool], remove: Callable[[Tier], Awaitable[_T]]
    ) -> list[_T]:
        """Remove from the bottom up, each time after the loads that may still copy a doomed block upwards.

        So a load that began before finds its copy removed later, and one that begins after finds nothing.
        """
        results = []
        for tier in reversed(self._tiers):
            loads = [load for key, load in self._loads.items() if doomed(key)]
            if loads:
                await asyncio.wait(loads)
            results.append(await remove(tier))
        return results
