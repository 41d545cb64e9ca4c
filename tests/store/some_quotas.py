"""Quotas over media that hold what a test says, and of which nothing can be removed."""

from collections.abc import Callable, Sequence

from tq_store.keys import BlockKey
from tq_store.results import NamespaceUsage
from tq_store.rpc.convert import METHODS
from tq_store.server.metrics import Metrics
from tq_store.server.quotas import Quotas


class Fixed:
    def __init__(self, held: dict[bytes, NamespaceUsage] | None = None, *everywhere: NamespaceUsage) -> None:
        self._held = held or {}
        self._everywhere = everywhere

    def of(self, tag: bytes) -> list[NamespaceUsage]:
        return [*self._everywhere, *([self._held[tag]] if tag in self._held else [])]

    async def first_to_go(self, tag: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        return []


async def remove_nothing(keys: Sequence[BlockKey]) -> list[bool]:
    return [False] * len(keys)


def quotas_over(
    realms: Fixed | None = None,
    *,
    metrics: Metrics | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Quotas:
    return Quotas(metrics or Metrics(METHODS), realms or Fixed(), remove_nothing, clock=clock)
