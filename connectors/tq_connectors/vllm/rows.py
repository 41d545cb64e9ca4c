"""Rows of vLLM's host memory to blocks and back: a row is a chunk, and holds a cell for every rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Protocol

import numpy as np

from tq_connectors.codec import CacheGeometry, block_info
from tq_connectors.envelope import pack_object, unpack_object
from tq_connectors.parts import shard_of
from tq_connectors.reshard import runs
from tq_kernels.layout import PageLayout
from tq_store.block import BlockInfo, BlockKind, pack_block, parse_header, payload_of
from tq_store.errors import IdentityMismatch
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Part
from tq_store.placed import PlacedBlock


class Rows(Protocol):
    """How the bytes of a row become a block."""

    @property
    def cell_bytes(self) -> int:
        """Bytes of one rank in a row."""

    def pack(self, key: BlockKey, row: memoryview) -> bytes:
        """A block from a row, whose bytes are read before this returns.

        Raises:
            BlockFormatError: They make no block.
        """

    def unpack(self, key: BlockKey, block: bytes, row: memoryview) -> None:
        """Fill a row from a block whose checksums have been verified.

        Raises:
            BlockFormatError: Not what `pack` makes for this key; the row is as before.
        """

    def placed(self, key: BlockKey, row: memoryview) -> PlacedBlock | None:
        """The block whose bytes lie in the row, in places of their own; None where they do not."""


@dataclass(frozen=True, slots=True)
class PageRows:
    """Rows of packed pages, as blocks with all heads, however many ranks there are.

    A cell holds pages layer after layer, of each layer in token order, with the heads of its rank.

    Args:
        layout: Of pages with all KV heads of the model.
        num_layers: Layers in a row.
        pages_per_chunk: Pages of each layer.
        tp_size: Ranks in a row, each with an equal run of heads; with more ranks than heads, neighbours hold
            the same head.

    Raises:
        ConfigError: Heads and ranks do not divide evenly.
    """

    layout: PageLayout
    num_layers: int
    pages_per_chunk: int
    tp_size: int = 1

    def __post_init__(self) -> None:
        self.part(0)

    def part(self, rank: int) -> Part:
        """Layers and heads of a rank."""
        geometry = CacheGeometry(
            num_layers=self.num_layers,
            num_kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_dim,
            kv_dtype="",
        )
        return shard_of(geometry, tp_rank=rank, tp_size=self.tp_size).part

    @property
    def rank_layout(self) -> PageLayout:
        """Of pages with the heads of one rank."""
        return replace(self.layout, num_kv_heads=max(1, self.layout.num_kv_heads // self.tp_size))

    @property
    def cell_bytes(self) -> int:
        """Bytes of one rank in a row."""
        return self._num_pages * self.rank_layout.page_bytes

    @property
    def _num_pages(self) -> int:
        return self.num_layers * self.pages_per_chunk

    def pack(self, key: BlockKey, row: memoryview) -> bytes:
        """A block from a row."""
        if self.tp_size == 1:
            return pack_block(self.info(key), row[: self.cell_bytes])
        payload = bytearray(self._num_pages * self.layout.page_bytes)
        for in_row, in_block in self.pieces():
            payload[in_block] = row[in_row]
        return pack_block(self.info(key), payload)

    def unpack(self, key: BlockKey, block: bytes, row: memoryview) -> None:
        """Fill a row from a block."""
        if parse_header(block) != self.info(key):
            raise IdentityMismatch("the block was made by another codec, or for another cache shape")
        payload = payload_of(block)
        if self.tp_size == 1:
            row[: self.cell_bytes] = payload
            return
        for in_row, in_block in self.pieces():
            row[in_row] = payload[in_block]

    def placed(self, key: BlockKey, row: memoryview) -> PlacedBlock | None:
        """The block that is the row; None where two ranks hold the same head, and a block holds it once."""
        places = _places(self)
        if places is None:
            return None
        pieces = [row[each] for each in places]
        copy = partial(_copy, pieces[0]) if len(pieces) == 1 else None
        return PlacedBlock(key, _kind(self), pieces, copy)

    def info(self, key: BlockKey) -> BlockInfo:
        """Header of a block."""
        info = block_info(self.layout, self.num_layers, key)
        return replace(info, num_tokens=self.pages_per_chunk * self.layout.page_tokens)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Where the pages of each rank lie in a row, and where in a block."""
        whole = replace(self, tp_size=1).part(0)
        sizes = {"section_bytes": self.layout.section_bytes, "pages_per_layer": self.pages_per_chunk}
        for rank in range(self.tp_size):
            for run in runs(self.part(rank), whole, **sizes):
                start = rank * self.cell_bytes + run.source_offset
                in_block = slice(run.target_offset, run.target_offset + run.num_bytes)
                yield slice(start, start + run.num_bytes), in_block


def _copy(row: memoryview, payload: memoryview) -> None:
    """Copy bytes by the processor, without the interpreter's lock."""
    np.frombuffer(row, np.uint8)[...] = np.frombuffer(payload, np.uint8)


@lru_cache
def _kind(rows: PageRows) -> BlockKind:
    return BlockKind(rows.info(BlockKey(bytes(BLOCK_KEY_BYTES))))


@lru_cache
def _places(rows: PageRows) -> list[slice] | None:
    """Where the bytes of a block lie in a row, in their order."""
    if rows.tp_size == 1:
        return [slice(rows.cell_bytes)]
    in_order = sorted(rows.pieces(), key=lambda piece: piece[1].start)
    is_once = all(one.stop == other.start for (_, one), (_, other) in pairwise(in_order))
    return [in_row for in_row, _ in in_order] if is_once else None


@dataclass(frozen=True, slots=True)
class RawRows:
    """Rows of bytes that nobody here reads, for engines that are divided in the same way only.

    Args:
        cell_bytes: Bytes of one rank in a row.
        num_ranks: Cells in a row: one a rank, or one of all ranks where they hold the same.
        words: What else tells such rows from others.
    """

    cell_bytes: int
    num_ranks: int
    words: str

    def pack(self, key: BlockKey, row: memoryview) -> bytes:
        """A block from a row."""
        return pack_object(key, self._layout, row[: self.cell_bytes * self.num_ranks])

    def unpack(self, key: BlockKey, block: bytes, row: memoryview) -> None:
        """Fill a row from a block."""
        found = unpack_object(key, block)
        if found.layout != self._layout or len(found.data) != self.cell_bytes * self.num_ranks:
            raise IdentityMismatch(
                f"the block holds {len(found.data)} bytes of {found.layout}, "
                f"not {self.cell_bytes * self.num_ranks} of {self._layout}"
            )
        row[: len(found.data)] = found.data

    def placed(self, key: BlockKey, row: memoryview) -> PlacedBlock | None:
        """None: a block says more than what is in the row."""
        return None

    @property
    def _layout(self) -> str:
        return f"vllm {self.num_ranks} x {self.cell_bytes} bytes, {self.words}"
