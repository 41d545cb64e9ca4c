"""Every byte offset of a page and every bit position of a packed word, in plain integers.

A page holds `page_tokens` tokens of one layer: one section per KV head, each a run of planes. Keys are packed
along channels and values along tokens, the axes that attention contracts. `proto/BLOCK_FORMAT.md` draws it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tq_kernels.spec import Code, CodecSpec, KeyCenter, Rotation

PAGE_ALIGNMENT_BYTES = 128
PAGE_TOKENS_MULTIPLE = 16

HADAMARD_ROOTS = {1: 1, 3: 12, 5: 20}
"""Smallest order of a Hadamard matrix known here, by the odd part of the order; doubling gives the others."""


@dataclass(frozen=True, slots=True)
class WordFormat:
    """How consecutive bits of a word hold the elements of a packed axis of n elements.

    The axis is cut into `groups` equal runs. Word u holds, of every group g, the `lanes` elements
    ``g * n / groups + lanes * u + lane``. Magnitude of (g, lane) starts at bit ``magnitude_shifts[g][lane]``
    of the 32-bit word; its sign is bit ``sign_shifts[g][lane]`` of the same word, or of a 16-bit word in a
    plane of its own. Codes without a sign bit of their own have no `sign_shifts`.
    """

    groups: int
    lanes: int
    magnitude_bits: int
    magnitude_shifts: tuple[tuple[int, ...], ...]
    sign_shifts: tuple[tuple[int, ...], ...] = ()
    sign_plane: bool = False

    @property
    def elements(self) -> int:
        """Elements in one word."""
        return self.groups * self.lanes


def _shifts(
    groups: int, lanes: int, rule: "tuple[tuple[int, ...], tuple[int, ...]]"
) -> tuple[tuple[int, ...], ...]:
    by_group, by_lane = rule
    return tuple(tuple(by_group[g] + by_lane[lane] for lane in range(lanes)) for g in range(groups))


_BYTES = (0, 8, 16, 24)
_NIBBLES = (0, 4, 8, 12)

WORD_FORMATS = {
    # a magnitude nibble is a selector of NVIDIA's `prmt`; a sign bit is, or shifts to, bit 7 of a byte
    Code.LM4: WordFormat(2, 4, 3, _shifts(2, 4, ((0, 16), _NIBBLES)), _shifts(2, 4, ((7, 3), _BYTES))),
    Code.LM3: WordFormat(
        4,
        4,
        2,
        _shifts(4, 4, ((0, 2, 16, 18), _NIBBLES)),
        # `word * 0x100001` puts lanes 2 and 3 where bytes 2 and 3 want them
        _shifts(4, 4, ((0, -1, -2, -3), (7, 15, 3, 11))),
        sign_plane=True,
    ),
    Code.LM2: WordFormat(
        4, 4, 1, _shifts(4, 4, ((0, 1, 2, 3), _BYTES)), _shifts(4, 4, ((7, 6, 5, 4), _BYTES))
    ),
    Code.E4M3_SCALED: WordFormat(1, 4, 8, (_BYTES,)),
    Code.E4M3: WordFormat(1, 4, 8, (_BYTES,)),
    Code.BF16: WordFormat(1, 2, 16, ((0, 16),)),
}


def can_rotate(head_dim: int) -> bool:
    """Whether a Hadamard matrix of this order is known here."""
    odd = head_dim // (head_dim & -head_dim)
    return head_dim >= HADAMARD_ROOTS.get(odd, head_dim + 1)


@dataclass(frozen=True, slots=True)
class Plane:
    """A contiguous row-major array inside a head's section; `offset` is in bytes from the section's start."""

    name: str
    offset: int
    rows: int
    columns: int
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the plane."""
        return self.rows * self.columns * self.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Where everything lies in a page.

    Planes of a section, in this order, absent ones left out: ``key_words`` ``[page_tokens, words]``,
    ``key_signs`` the same as 16-bit words, ``value_words`` ``[words, head_dim]``, ``value_signs``,
    ``key_scales`` and ``value_scales`` ``[page_tokens]`` fp16, ``key_center`` ``[head_dim]`` fp16; then zeros
    up to a multiple of 128 bytes and of `page_tokens`, so that engines may see a page as token rows.

    Args:
        spec: The codec.
        head_dim: Channels of a key and of a value, a multiple of 16.
        num_kv_heads: KV heads in the page.
        page_tokens: Tokens in the page, a multiple of 16.

    Raises:
        ValueError: A size that cannot be packed; the message names it.
    """

    spec: CodecSpec
    head_dim: int
    num_kv_heads: int
    page_tokens: int = 64
    planes: tuple[Plane, ...] = field(init=False, repr=False, compare=False)
    section_bytes: int = field(init=False, repr=False, compare=False)
    page_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of a page: all heads, statistics and padding included."""
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.head_dim < 16 or self.head_dim % 16:
            raise ValueError(f"head_dim must be a positive multiple of 16, not {self.head_dim}")
        if self.spec.rotation is not Rotation.NONE and not can_rotate(self.head_dim):
            raise ValueError(
                f"head_dim {self.head_dim} cannot be rotated; 2^k, 12 * 2^k and 20 * 2^k can "
                "(64, 80, 96, 128, 256, ...), and the presets fp8 and raw take any multiple of 16"
            )
        if self.page_tokens < PAGE_TOKENS_MULTIPLE or self.page_tokens % PAGE_TOKENS_MULTIPLE:
            raise ValueError(
                f"page_tokens must be a positive multiple of {PAGE_TOKENS_MULTIPLE}, not {self.page_tokens}"
            )
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be at least 1, not {self.num_kv_heads}")
        planes, offset = [], 0
        for name, rows, columns, item_bytes in self._shapes():
            planes.append(Plane(name, offset, rows, columns, item_bytes))
            offset += planes[-1].num_bytes
        alignment = math.lcm(PAGE_ALIGNMENT_BYTES, self.page_tokens)
        object.__setattr__(self, "planes", tuple(planes))
        object.__setattr__(self, "section_bytes", -(-offset // alignment) * alignment)
        object.__setattr__(self, "page_bytes", self.section_bytes * self.num_kv_heads)
        sizes = (self.spec, self.head_dim, self.num_kv_heads, self.page_tokens)
        object.__setattr__(self, "_hash", hash(sizes))

    def __hash__(self) -> int:
        """Of what is compared; computed once, as constants of kernels are found by their layout."""
        return self._hash

    def __reduce__(self) -> tuple[Callable[[], "PageLayout"], tuple[()]]:
        """Made anew in another process, where the same names have other hashes."""
        sizes = {
            "head_dim": self.head_dim,
            "num_kv_heads": self.num_kv_heads,
            "page_tokens": self.page_tokens,
        }
        return partial(PageLayout, spec=self.spec, **sizes), ()

    def _shapes(self) -> list[tuple[str, int, int, int]]:
        shapes = []
        for side, code in (("key", self.spec.key), ("value", self.spec.value)):
            word = WORD_FORMATS[code]
            if side == "key":
                rows, columns = self.page_tokens, self.head_dim // word.elements
            else:
                rows, columns = self.page_tokens // word.elements, self.head_dim
            shapes.append((f"{side}_words", rows, columns, 4))
            if word.sign_plane:
                shapes.append((f"{side}_signs", rows, columns, 2))
        for side, code in (("key", self.spec.key), ("value", self.spec.value)):
            if code.rotated:
                shapes.append((f"{side}_scales", 1, self.page_tokens, 2))
        if self.spec.key_center is not KeyCenter.NONE:
            shapes.append(("key_center", 1, self.head_dim, 2))
        return shapes

    def plane(self, name: str) -> Plane | None:
        """The plane of that name, or None where the spec has none."""
        return next((plane for plane in self.planes if plane.name == name), None)

    @property
    def slot_bytes(self) -> int:
        """Bytes per token and KV head, keys and values together; always whole."""
        return self.section_bytes // self.page_tokens
