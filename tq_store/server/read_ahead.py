"""The blocks of a Get, read ahead of the sender in groups, within a window that all calls share."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from tq_store.keys import BlockKey
from tq_store.rpc.limits import MAX_FRAME_BYTES
from tq_store.runs import runs_of
from tq_store.server.tenant_store import TenantStore
from tq_store.server.window import ByteWindow

_MOST_GROUP_BYTES = 32 << 20
_MOST_GROUP_BLOCKS = 64
_MOST_AT_HAND_BLOCKS = 256
_FIRST_GUESS_BYTES = 4 << 20
_GROUPS_IN_WINDOW = 8
"""A group is at most this part of the window, so that one slow reader leaves room for others."""


class ReadAhead:
    """Reads blocks for the gets of one server.

    What lies in memory is read in groups as large as may be, when it is the group's turn. The rest is read
    ahead, in groups that grow: the size of a block is known only once it was read; until then it counts as
    the last one.

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
        """Yield the block of each key, or None, for a sender that cuts them into frames.

        While a group is being sent, the next one that is not in memory is read. Must be closed.

        Raises:
            BackendFull: The window stayed full.
        """
        async with aclosing(self._groups(keys, _framed_share, is_quick=False)) as groups:
            async for group, blocks in groups:
                for block in blocks:
                    yield block
                    group.release(block)

    async def groups(
        self, keys: Sequence[BlockKey], *, is_quick: bool
    ) -> AsyncGenerator[list[bytes | None], None]:
        """As `blocks`, whole groups, for a sender that makes no copies.

        Args:
            keys: Of the blocks.
            is_quick: Whether each group is done with there and then. So a group of what is in memory takes
                all the room there is: it gives it back in no time.
        """
        async with aclosing(self._groups(keys, int, is_quick=is_quick)) as groups:
            async for _, blocks in groups:
                yield blocks

    async def _groups(
        self, keys: Sequence[BlockKey], share_of: Callable[[int], int], *, is_quick: bool
    ) -> AsyncGenerator[tuple["_Group", list[bytes | None]], None]:
        num_blocks, largest_bytes, start = 1, 1, 0
        ahead: _Group | None = None
        try:
            while start < len(keys):
                group = ahead or self._next_group(keys[start:], num_blocks, share_of, is_quick=is_quick)
                ahead = None
                try:
                    blocks = await group.read()
                    start += len(blocks)
                    largest_bytes = max(largest_bytes, *(len(block or b"") for block in blocks))
                    self._last_bytes = max(
                        (len(block) for block in blocks if block), default=self._last_bytes
                    )
                    affordable_blocks = self._most_bytes // largest_bytes
                    num_blocks = max(1, min(2 * num_blocks, _MOST_GROUP_BLOCKS, affordable_blocks))
                    if start < len(keys) and not self._store.sizes_at_hand(keys[start : start + 1]):
                        ahead = self._next_group(keys[start:], num_blocks, share_of, is_quick=is_quick)
                        ahead.read_ahead()
                    yield group, blocks
                finally:
                    await group.close()
        finally:
            if ahead is not None:
                await ahead.close()

    def _next_group(
        self, keys: Sequence[BlockKey], num_blocks: int, share_of: Callable[[int], int], *, is_quick: bool
    ) -> "_Group":
        """Of the first keys: those in memory, or else so many."""
        sizes_bytes = self._store.sizes_at_hand(keys[:_MOST_AT_HAND_BLOCKS])
        if sizes_bytes:
            room_bytes = min(_MOST_GROUP_BYTES, self._window.free_bytes) if is_quick else 0
            shares = [share_of(num_bytes) for num_bytes in sizes_bytes]
            run = next(runs_of(shares, int, most_bytes=max(room_bytes, self._most_bytes)))
            return _Group(self._store, keys[: len(run)], self._window, sum(run), share_of)
        keys = keys[:num_blocks]
        expected_bytes = share_of(self._last_bytes) * len(keys)
        return _Group(self._store, keys, self._window, expected_bytes, share_of)


class _Group:
    """Some blocks that are to be read, or are being read, and their share of the window."""

    def __init__(
        self,
        store: TenantStore,
        keys: Sequence[BlockKey],
        window: ByteWindow,
        expected_bytes: int,
        share_of: Callable[[int], int],
    ) -> None:
        self._store = store
        self._keys = keys
        self._window = window
        self._expected_bytes = expected_bytes
        self._share_of = share_of
        self._held_bytes = 0
        self._task: asyncio.Task[list[bytes | None]] | None = None

    def read_ahead(self) -> None:
        """Begin now."""
        self._task = asyncio.create_task(self._read())
        # how it failed is of interest only where its turn comes
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def read(self) -> list[bytes | None]:
        """The blocks, when they are there."""
        return await (self._task or self._read())

    def release(self, block: bytes | None) -> None:
        """Hand the share of a block back."""
        share = self._share_of(len(block or b""))
        self._held_bytes -= share
        self._window.give(share)

    async def close(self) -> None:
        """Stop reading, and hand back what is still held."""
        try:
            if self._task is not None and not self._task.done():
                self._task.cancel()
                await asyncio.wait([self._task])
        finally:  # whoever is cancelled may be so again
            self._window.give(self._held_bytes)
            self._held_bytes = 0

    async def _read(self) -> list[bytes | None]:
        await self._window.take(self._expected_bytes)
        self._held_bytes = self._expected_bytes
        blocks = await self._store.get(self._keys)
        really_bytes = sum(self._share_of(len(block or b"")) for block in blocks)
        self._window.adjust(really_bytes - self._held_bytes)
        self._held_bytes = really_bytes
        return blocks


def _framed_share(block_bytes: int) -> int:
    """A block, the frame that is packed of it, and grpc's copy of that frame."""
    return block_bytes + 2 * min(block_bytes, MAX_FRAME_BYTES)
