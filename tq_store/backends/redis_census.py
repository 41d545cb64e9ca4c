"""How many blocks and bytes each namespace has in Redis, counted in the background, a little at a time."""

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from tq_store.backends.redis_shard import Shard
from tq_store.backends.redis_target import Address
from tq_store.errors import BackendError
from tq_store.results import NamespaceUsage

_STEP_KEYS = 500
_STEP_PAUSE_S = 0.25
"""At most 2,000 keys a second: well under 1 % of a server's time, and a million keys in nine minutes."""
_BLOCK_KEY = re.compile(rb"tq:1:([0-9a-f]{64}):[0-9a-f]{64}")


class Census:
    """What the last pass over each server found.

    Redis evicts and expires on its own and says nothing of it, so a running total would drift; a pass that
    scans is right about what it saw. Keys that come and go during a pass may be counted or not, and one that
    moves within the server's table may be counted twice.
    """

    def __init__(self) -> None:
        self._tallies: dict[Address, dict[str, NamespaceUsage]] = {}

    @property
    def namespaces(self) -> Mapping[str, NamespaceUsage]:
        """Blocks and bytes by namespace digest in hex, over all servers."""
        num_blocks: Counter[str] = Counter()
        used_bytes: Counter[str] = Counter()
        for tally in self._tallies.values():
            for namespace, usage in tally.items():
                num_blocks[namespace] += usage.num_blocks
                used_bytes[namespace] += usage.used_bytes
        return {
            namespace: NamespaceUsage(num_blocks=count, used_bytes=used_bytes[namespace])
            for namespace, count in num_blocks.items()
        }

    async def take(self, shards: Sequence[Shard], *, timeout_s: float) -> None:
        """Count each server; one that fails keeps its last count, one that is not named loses it.

        Args:
            shards: All servers.
            timeout_s: Deadline of each step.
        """
        addresses = {shard.address for shard in shards}
        self._tallies = {key: tally for key, tally in self._tallies.items() if key in addresses}
        for shard in shards:
            try:
                self._tallies[shard.address] = await _tally(shard, timeout_s)
            except BackendError:
                continue  # the shard has counted and logged it

    def forget(self, namespace: bytes | None) -> None:
        """Drop a namespace that was purged, or all."""
        for tally in self._tallies.values():
            if namespace is None:
                tally.clear()
            else:
                tally.pop(namespace.hex(), None)


async def _tally(shard: Shard, timeout_s: float) -> dict[str, NamespaceUsage]:
    num_blocks: Counter[str] = Counter()
    used_bytes: Counter[str] = Counter()
    cursor = 0
    while True:
        cursor, keys = await shard.scan(cursor, match="tq:1:*", count=_STEP_KEYS, timeout_s=timeout_s)
        for key, size in zip(keys, await shard.sizes(keys, timeout_s=timeout_s), strict=True):
            if size and (match := _BLOCK_KEY.fullmatch(key)):
                namespace = match[1].decode()
                num_blocks[namespace] += 1
                used_bytes[namespace] += size
        if cursor == 0:
            return {
                namespace: NamespaceUsage(num_blocks=count, used_bytes=used_bytes[namespace])
                for namespace, count in num_blocks.items()
            }
        await asyncio.sleep(_STEP_PAUSE_S)
