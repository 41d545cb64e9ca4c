"""The blocks of a Get, read ahead of the sender in groups, within a window that all calls share."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tq_store.keys import BlockKey
from tq_store.rpc.limits import MAX_FRAME_BYTES
from tq_store.server.tenant_store import TenantStore
from tq_store.server.window import ByteWindow

_MOST_GROUP_BYTES = 32 << 20
_MOST_GROUP_BLOCKS = 64
_FIRST_GUESS_BYTES = 4 << 20
_GROUPS_IN_WINDOW = 8
"""A group is at most this part of the window, so that one slow reader leaves room for others."""


class ReadAhead:
    """Reads blocks for the gets of one server.

    The size of a block is known only once it was read; until then it counts as the last one.

    Args:
        store: What is read.
        window: Bounds what is read and not yet sent. A block counts from before it is read until the next
            one is asked for.
    """

    def __init__(self, store: TenantStore, window: ByteWindow) -> None:
        self._store = store
        self._window = window
        self._most_bytes = min(_MOST_GROUP_BYTES, window.limit_bytes // _GROUPS_IN_WINDOW)
        self._last_bytes = _FIRST_GUESS_BYTES

    async def blocks(self, keys: Sequence[BlockKey]) -> AsyncGenerator[bytes | None, None]:
        """Yield the block of each key, or None; while one group is being sent, the next is being read.

        Must be closed.

        Raises:
            BackendFull: The window stayed full.
        """
        async with aclosing(self._groups(keys)) as groups:
            async for group, blocks in groups:
                for block in blocks:
                    yield block
                    group.release(block)

    async def groups(self, keys: Sequence[BlockKey]) -> AsyncGenerator[list[bytes | None], None]:
        """As `blocks`, whole groups."""
        async with aclosing(self._groups(keys)) as groups:
            async for _, blocks in groups:
                yield blocks

    async def _groups(
        self, keys: Sequence[BlockKey]
    ) -> AsyncGenerator[tuple["_Group", list[bytes | None]], None]:
        """The first block is read alone, then groups that grow."""
        group_blocks, largest_bytes, start = 1, 1, 0
        group = self._begin(keys[:1])
        try:
            while start < len(keys):
                blocks = await group.read()
                start += len(blocks)
                self._last_bytes = max((len(block) for block in blocks if block), default=self._last_bytes)
                largest_bytes = max(largest_bytes, *(len(block or b"") for block in blocks))
                affordable_blocks = self._most_bytes // largest_bytes
                group_blocks = max(1, min(2 * group_blocks, _MOST_GROUP_BLOCKS, affordable_blocks))
                sending, group = group, self._begin(keys[start : start + group_blocks])
                try:
                    yield sending, blocks
                finally:
                    sending.release_rest()
        finally:
            await group.close()

    def _begin(self, keys: Sequence[BlockKey]) -> "_Group":
        return _Group(self._store, keys, self._window, expected_bytes=self._last_bytes)


class _Group:
    """Some blocks that are being read, and their share of the window.

    A block's share covers, besides itself, the frame that is packed of it and grpc's copy of that frame.
    """

    def __init__(
        self, store: TenantStore, keys: Sequence[BlockKey], window: ByteWindow, *, expected_bytes: int
    ) -> None:
        self._store = store
        self._keys = keys
        self._window = window
        self._held_bytes = 0
        self._task = asyncio.create_task(self._read(_share(expected_bytes) * len(keys)))

    async def read(self) -> list[bytes | None]:
        """The blocks, when they are there."""
        return await self._task

    def release(self, block: bytes | None) -> None:
        """Hand the share of a block back."""
        share = _share(len(block or b""))
        self._held_bytes -= share
        self._window.give(share)

    def release_rest(self) -> None:
        """Hand back what is still held."""
        self._window.give(self._held_bytes)
        self._held_bytes = 0

    async def close(self) -> None:
        """Stop reading, and hand back what is held."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.release_rest()

    async def _read(self, expected_bytes: int) -> list[bytes | None]:
        if not self._keys:
            return []
        await self._window.take(expected_bytes)
        self._held_bytes = expected_bytes
        blocks = await self._store.get(self._keys)
        really_bytes = sum(_share(len(block or b"")) for block in blocks)
        self._window.adjust(really_bytes - expected_bytes)
        self._held_bytes = really_bytes
        return blocks


def _share(block_bytes: int) -> int:
    return block_bytes + 2 * min(block_bytes, MAX_FRAME_BYTES)
