"""What kernels must know of a page at compile time: sizes, codes and byte offsets, in one hashable value."""

from dataclasses import dataclass
from functools import lru_cache

from tq_kernels.layout import WORD_FORMATS, PageLayout
from tq_kernels.spec import KeyCenter

_SMALLEST_TILE = 64
"""Channels of the smallest tile, so that four groups of four lanes of four words fill it."""
_LARGEST_HEAD_DIM = 256
"""Channels up to which bfloat16 has the integers of head_dim times the rotation; float16 has more of them."""
_LARGEST_PAGE_TOKENS = 128
"""Tokens up to which `device/runs.py` can count them in bytes of an integer, the sign left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """Compile-time facts of a layout; offsets are in bytes from the start of a head's section."""

    head_dim: int
    tile_dim: int
    page_tokens: int
    section_bytes: int
    used_bytes: int
    tail_tile: int
    key_code: int
    value_code: int
    key_rotated: bool
    value_rotated: bool
    key_groups: int
    value_groups: int
    key_words: int
    key_signs: int
    value_words: int
    value_signs: int
    key_scales: int
    value_scales: int
    key_center: int
    centered: bool


@lru_cache(maxsize=64)
def page_shape(layout: PageLayout) -> PageShape:
    """Compile-time facts of a layout.

    Raises:
        ValueError: page_tokens is not a power of two, which tiles must be, or one of the sizes is too large.
    """
    if layout.head_dim > _LARGEST_HEAD_DIM:
        raise ValueError(f"kernels need head_dim to be at most {_LARGEST_HEAD_DIM}, not {layout.head_dim}")
    if layout.page_tokens & (layout.page_tokens - 1):
        raise ValueError(f"kernels need page_tokens to be a power of two, not {layout.page_tokens}")
    if layout.page_tokens > _LARGEST_PAGE_TOKENS:
        raise ValueError(
            f"kernels need page_tokens to be at most {_LARGEST_PAGE_TOKENS}, not {layout.page_tokens}"
        )
    used = layout.planes[-1].offset + layout.planes[-1].num_bytes
    key, value = WORD_FORMATS[layout.spec.key], WORD_FORMATS[layout.spec.value]
    return PageShape(
        head_dim=layout.head_dim,
        tile_dim=max(_SMALLEST_TILE, 1 << (layout.head_dim - 1).bit_length()),
        page_tokens=layout.page_tokens,
        section_bytes=layout.section_bytes,
        used_bytes=used,
        tail_tile=1 << ((layout.section_bytes - used) // 4).bit_length(),
        key_code=int(layout.spec.key),
        value_code=int(layout.spec.value),
        key_rotated=layout.spec.key.rotated,
        value_rotated=layout.spec.value.rotated,
        key_groups=key.groups,
        value_groups=value.groups,
        key_words=_offset(layout, "key_words"),
        key_signs=_offset(layout, "key_signs"),
        value_words=_offset(layout, "value_words"),
        value_signs=_offset(layout, "value_signs"),
        key_scales=_offset(layout, "key_scales"),
        value_scales=_offset(layout, "value_scales"),
        key_center=_offset(layout, "key_center"),
        centered=layout.spec.key_center is not KeyCenter.NONE,
    )


def _offset(layout: PageLayout, name: str) -> int:
    plane = layout.plane(name)
    return plane.offset if plane else 0
