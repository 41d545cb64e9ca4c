"""What realms hold in each medium, counted there at once or asked for now and then, and what could go."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tq_store.backends.base import Backend, Counted
from tq_store.backends.usage import GROUP_BYTES
from tq_store.errors import BackendError
from tq_store.keys import BlockKey
from tq_store.results import NamespaceUsage

logger = logging.getLogger(__name__)

_POLL_S = 10.0


class RealmUsage:
    """Answers for tags, the bytes with which all keys of a realm begin. Called from one event loop.

    Args:
        backends: Owned by the caller.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._counted = [backend for backend in backends if isinstance(backend, Counted)]
        self._asked = [backend for backend in backends if not isinstance(backend, Counted)]
        self._answers: dict[str, dict[bytes, NamespaceUsage]] = {}

    def of(self, tag: bytes) -> Iterator[NamespaceUsage]:
        """What a realm holds, medium by medium."""
        for backend in self._counted:
            yield backend.usage.of_group(tag)
        for answer in self._answers.values():
            if tag in answer:
                yield answer[tag]

    async def first_to_go(self, tag: bytes, *, num_bytes: int, num_blocks: int) -> list[BlockKey]:
        """Blocks of a realm that come to about both sizes, the least worth keeping first.

        Empty where the medium that holds most of the realm does not count by itself, or fails.
        Blocks that a faster medium has too are in use, whatever the slower one knows of it: they come last.
        """
        if not self._counted:
            return []
        held = [backend.usage.of_group(tag).used_bytes for backend in self._counted]
        largest = self._counted[held.index(max(held))]
        if any(answer[tag].used_bytes > max(held) for answer in self._answers.values() if tag in answer):
            return []
        try:
            faster = self._counted[: self._counted.index(largest)]
            return await _choose(largest, faster, tag, num_bytes=num_bytes, num_blocks=num_blocks)
        except BackendError as error:
            logger.debug("the %s tier did not say what could go: %s", largest.name, error)
            return []

    async def watch(self) -> None:
        """Ask those that do not count by themselves every ten seconds, until cancelled."""
        while self._asked:
            await self.refresh()
            await asyncio.sleep(_POLL_S)

    async def refresh(self) -> None:
        """Ask now; one that fails keeps its last answer."""
        for backend in self._asked:
            try:
                namespaces = (await backend.stats()).namespaces
            except BackendError as error:
                logger.debug("the %s tier did not tell what tenants hold: %s", backend.name, error)
                continue
            by_tag: defaultdict[bytes, list[NamespaceUsage]] = defaultdict(list)
            for namespace, usage in namespaces.items():
                by_tag[bytes.fromhex(namespace)[:GROUP_BYTES]].append(usage)
            self._answers[backend.name] = {
                tag: NamespaceUsage(
                    num_blocks=sum(usage.num_blocks for usage in usages),
                    used_bytes=sum(usage.used_bytes for usage in usages),
                )
                for tag, usages in by_tag.items()
            }


async def _choose(
    largest: Counted, faster: Sequence[Counted], tag: bytes, *, num_bytes: int, num_blocks: int
) -> list[BlockKey]:
    if not faster:
        return await largest.first_to_go(tag, num_bytes=num_bytes, num_blocks=num_blocks)
    # twice as many as asked for, so that there is a choice
    keys = await largest.first_to_go(tag, num_bytes=2 * num_bytes, num_blocks=2 * num_blocks)
    is_used = [any(flags) for flags in zip(*[await each.contains(keys) for each in faster], strict=True)]
    unused = [key for key, used in zip(keys, is_used, strict=True) if not used]
    used = [key for key, used in zip(keys, is_used, strict=True) if used]
    return [*unused, *used][: (len(keys) + 1) // 2]
