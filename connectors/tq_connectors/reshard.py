"""Pages cut and put together by whole layers and whole KV heads: bytes are moved, never changed.

Pages of a part lie as in a block: layer after layer, of each layer the pages in token order, of each page one
section per KV head.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tq_store.block import Buffer
from tq_store.keys import Part


class Run(NamedTuple):
    """Bytes that lie together in two places."""

    source_offset: int
    target_offset: int
    num_bytes: int


def runs(source: Part, target: Part, *, section_bytes: int, pages_per_layer: int = 1) -> Iterator[Run]:
    """Where what two parts have in common lies in the pages of each, in the fewest pieces.

    Args:
        source: What the one holds.
        target: What the other holds.
        section_bytes: Bytes of one KV head in one page (`PageLayout.section_bytes`).
        pages_per_layer: Pages of each layer.

    Raises:
        ValueError: A size below 1.
    """
    if min(section_bytes, pages_per_layer) < 1:
        raise ValueError(f"{pages_per_layer} pages of sections of {section_bytes} bytes cannot be cut")
    common = source.overlap(target)
    if common is None:
        return
    source_heads, target_heads = source.num_kv_heads, target.num_kv_heads
    source_page = (common.first_layer - source.first_layer) * pages_per_layer
    target_page = (common.first_layer - target.first_layer) * pages_per_layer
    num_pages, num_heads = common.num_layers * pages_per_layer, common.num_kv_heads
    if num_heads == source_heads == target_heads:
        num_pages, num_heads = 1, num_pages * num_heads
    source_head = common.first_kv_head - source.first_kv_head
    target_head = common.first_kv_head - target.first_kv_head
    for page in range(num_pages):
        yield Run(
            ((source_page + page) * source_heads + source_head) * section_bytes,
            ((target_page + page) * target_heads + target_head) * section_bytes,
            num_heads * section_bytes,
        )


def slice_pages(
    pages: Buffer, held: Part, wanted: Part, *, section_bytes: int, pages_per_layer: int = 1
) -> memoryview:
    """Pages of some of the layers and heads; without a copy where they lie together.

    Args:
        pages: Pages of what is held.
        held: Layers and heads in `pages`.
        wanted: Layers and heads in the result, all of them held.
        section_bytes: Bytes of one KV head in one page.
        pages_per_layer: Pages of each layer.

    Raises:
        ValueError: `pages` has another length, or not all that is wanted is held.
    """
    if not held.covers(wanted):
        raise ValueError(f"{wanted} does not lie within {held}")
    source = _checked(pages, held, section_bytes, pages_per_layer)
    pieces = list(runs(held, wanted, section_bytes=section_bytes, pages_per_layer=pages_per_layer))
    views = [source[piece.source_offset : piece.source_offset + piece.num_bytes] for piece in pieces]
    return views[0] if len(views) == 1 else memoryview(b"".join(views))


def join_pages(
    pieces: Sequence[tuple[Part, Buffer]], wanted: Part, *, section_bytes: int, pages_per_layer: int = 1
) -> memoryview:
    """Pages of some layers and heads from pages of parts; without a copy where one part holds them together.

    Args:
        pieces: Parts and the pages of each; no two have anything in common, and what is not wanted of them is
            left out.
        wanted: Layers and heads in the result.
        section_bytes: Bytes of one KV head in one page.
        pages_per_layer: Pages of each layer.

    Raises:
        ValueError: Pages have another length, parts have something in common, or they lack some of `wanted`.
    """
    sizes = {"section_bytes": section_bytes, "pages_per_layer": pages_per_layer}
    if len(pieces) == 1:
        ((part, pages),) = pieces
        return slice_pages(pages, part, wanted, **sizes)
    parts = [part for part, _ in pieces]
    if any(one.overlap(other) for one, other in itertools.combinations(parts, 2)):
        raise ValueError(f"parts that have something in common cannot be joined: {parts}")
    joined, num_bytes = bytearray(_num_bytes(wanted, section_bytes, pages_per_layer)), 0
    for part, pages in pieces:
        source = _checked(pages, part, section_bytes, pages_per_layer)
        for run in runs(part, wanted, **sizes):
            piece = source[run.source_offset : run.source_offset + run.num_bytes]
            joined[run.target_offset : run.target_offset + run.num_bytes] = piece
            num_bytes += run.num_bytes
    if num_bytes != len(joined):
        raise ValueError(f"{parts} do not make up {wanted}")
    return memoryview(joined)


def _num_bytes(part: Part, section_bytes: int, pages_per_layer: int) -> int:
    return part.num_layers * pages_per_layer * part.num_kv_heads * section_bytes


def _checked(pages: Buffer, part: Part, section_bytes: int, pages_per_layer: int) -> memoryview:
    """The pages as bytes, if they are as long as the part says."""
    view, num_bytes = memoryview(pages).cast("B"), _num_bytes(part, section_bytes, pages_per_layer)
    if len(view) != num_bytes:
        raise ValueError(f"pages of {part} have {num_bytes} bytes, not {len(view)}")
    return view
