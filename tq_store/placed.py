"""Blocks whose payload lies in several places of the caller's memory, and is never put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tq_store.block import HEADER_BYTES, BlockKind
from tq_store.keys import BlockKey

Copy = Callable[[memoryview], None]
"""Copies a payload to where it belongs."""


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block to be put from places, or to be got into them.

    Args:
        key: The block's.
        kind: What it holds.
        pieces: Of bytes, each in one run, together as long as the payload; writable for a get. None are
            needed for a get with `copy`.
        copy: Copies a payload to the places in fewer steps than one a piece, where their owner can.
    """

    key: BlockKey
    kind: BlockKind
    pieces: Sequence[memoryview]
    copy: Copy | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the block, header included."""
        return HEADER_BYTES + self.kind.payload_bytes

    def pack_header(self) -> bytes:
        """The header for what lies in the places.

        Raises:
            LengthMismatch: It is not as long as the payload.
        """
        return self.kind.pack_header(self.key, self.pieces)

    def fill(self, payload: memoryview) -> None:
        """Copy a payload of the right length to the places."""
        if self.copy is not None:
            self.copy(payload)
            return
        start = 0
        for piece in self.pieces:
            piece[:] = payload[start : start + len(piece)]
            start += len(piece)
