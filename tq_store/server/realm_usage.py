"""What realms hold in each medium: counted there at once, or asked for now and then."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tq_store.backends.base import Backend, Counted
from tq_store.backends.usage import GROUP_BYTES
from tq_store.errors import BackendError
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
