"""PageBlocks: from where the bytes of a page lie to the blocks of its parts, without moving a byte."""

from collections.abc import Iterator, Sequence

from tq_connectors.reshard import runs
from tq_connectors.sglang.page_codecs import PageCodec
from tq_connectors.sglang.page_names import PageNames
from tq_store.block import BlockKind
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Part
from tq_store.placed import Copy, PlacedBlock


class PageBlocks:
    """The blocks of pages whose bytes lie in pieces.

    Args:
        names: Gives pages their keys.
        codec: Says what blocks hold.
        parts: Into which pages are cut; each lies within what the process holds.
    """

    def __init__(self, names: PageNames, codec: PageCodec, parts: Sequence[Part]) -> None:
        held, any_key = names.shard.part, BlockKey(bytes(BLOCK_KEY_BYTES))
        self._kinds = [BlockKind(codec.info(any_key, part)) for part in parts]
        self._runs = [[*runs(part, held, section_bytes=codec.section_bytes)] for part in parts]
        self.are_pages = list(parts) == [held]
        """Whether each block is all that the process holds of a page."""

    def copied(self, keys: Sequence[BlockKey], copies: Sequence[Copy]) -> list[PlacedBlock]:
        """One block a page, where blocks are pages, to be got by its owner's copy.

        Args:
            keys: Of the blocks.
            copies: What copies all bytes of each page to where they belong.
        """
        (kind,) = self._kinds
        return [PlacedBlock(key, kind, (), copy) for key, copy in zip(keys, copies, strict=True)]

    def of(self, keys: Sequence[BlockKey], pages: Sequence[Sequence[memoryview]]) -> list[PlacedBlock]:
        """One block a part, page after page.

        Args:
            keys: Of the blocks.
            pages: The bytes of all that the process holds of each page, in pieces.
        """
        if self.are_pages:
            (kind,) = self._kinds
            return [PlacedBlock(key, kind, pieces) for key, pieces in zip(keys, pages, strict=True)]
        cuts = (
            (kind, [piece for run in own for piece in _cut(pieces, run.target_offset, run.num_bytes)])
            for pieces in pages
            for kind, own in zip(self._kinds, self._runs, strict=True)
        )
        return [PlacedBlock(key, *cut) for key, cut in zip(keys, cuts, strict=True)]


def _cut(pieces: Sequence[memoryview], start: int, num_bytes: int) -> Iterator[memoryview]:
    """Some of the bytes that lie in pieces."""
    for piece in pieces:
        cut = piece[max(0, start) : max(0, start + num_bytes)]
        if cut:
            yield cut
        start -= len(piece)
