"""Sizes and offsets of a cold page, in plain integers; `proto/BLOCK_FORMAT.md` draws a section."""

import hashlib
import math
from dataclasses import dataclass

from tq_kernels.layout import can_rotate
from tq_kernels.spec import DEFAULT_ROTATION_SEED

CODEC_ID = 2
PACKING_ID = 1
LANES = 8
"""Readers of a section that run side by side; token t belongs to lane t mod 8."""
SECTION_VERSION = 1
HEADER_FIELDS = {
    "num_words": (0, "H"),
    "version": (2, "B"),
    "reserved": (3, "B"),
    "key_table": (4, "B"),
    "value_table": (5, "B"),
    "key_octave": (6, "B"),
    "value_octave": (7, "B"),
    "key_scale_table": (8, "B"),
    "value_scale_table": (9, "B"),
    "key_middle": (10, "B"),
    "value_middle": (11, "B"),
    "key_top": (12, "h"),
    "value_top": (14, "h"),
}
"""Offset and struct code of every field of a section's header."""
HEADER_BYTES = 16

_SCALE_BITS = 5
"""About what a scale costs; only `section_bytes_for` wants to know."""


def section_bytes_for(bits: float, head_dim: int, page_tokens: int) -> int:
    """Bytes of a section whose indices may take `bits` each, what else it holds on top; a multiple of 4."""
    body_bits = 2 * page_tokens * (head_dim * bits + _SCALE_BITS)
    return -(-(_fixed_bytes(head_dim) + math.ceil(body_bits / 8)) // 4) * 4


def _fixed_bytes(head_dim: int) -> int:
    return HEADER_BYTES + 2 * head_dim + 4 * LANES


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdLayout:
    """A page of `num_kv_heads` sections of one size, one after the other.

    A section is its header, the key centre ``[head_dim]`` fp16, lane states ``[8]`` uint32, words uint16, and
    zeros up to its size; all little-endian.

    Args:
        head_dim: Channels of a key and of a value: up to 256, a multiple of 16 that can be rotated.
        num_kv_heads: KV heads in the page.
        page_tokens: Tokens in the page, a multiple of 16.
        section_bytes: Bytes of a section, a multiple of 4; room for one to eight bits an index.
        rotation_seed: Seed of the signs, in ``[0, 2**64)``.

    Raises:
        ValueError: A size that does not fit; the message names it.
    """

    head_dim: int
    num_kv_heads: int
    page_tokens: int = 128
    section_bytes: int
    rotation_seed: int = DEFAULT_ROTATION_SEED

    def __post_init__(self) -> None:
        if not 16 <= self.head_dim <= 256 or self.head_dim % 16 or not can_rotate(self.head_dim):
            raise ValueError(
                f"head_dim must be a multiple of 16 up to 256 that can be rotated, not {self.head_dim}"
            )
        if self.page_tokens < 16 or self.page_tokens % 16:
            raise ValueError(f"page_tokens must be a positive multiple of 16, not {self.page_tokens}")
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be at least 1, not {self.num_kv_heads}")
        least, most = (section_bytes_for(bits, self.head_dim, self.page_tokens) for bits in (1, 8))
        most = min(most, self.words_offset + 2 * 0xFFFF)
        if self.section_bytes % 4 or not least <= self.section_bytes <= most:
            raise ValueError(
                f"section_bytes must be a multiple of 4 in [{least}, {most}], not {self.section_bytes}"
            )
        if not 0 <= self.rotation_seed < 1 << 64:
            raise ValueError(f"rotation_seed must be in [0, 2**64), not {self.rotation_seed}")

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over every parameter but the shape: 32 bytes, part of a cache's identity."""
        parts = f"codec={CODEC_ID};packing={PACKING_ID};section={self.section_bytes}"
        return hashlib.sha256(f"{parts};rotation=1:{self.rotation_seed}".encode()).digest()

    @property
    def center_offset(self) -> int:
        """Where the key centre of a section begins."""
        return HEADER_BYTES

    @property
    def states_offset(self) -> int:
        """Where the lane states of a section begin."""
        return HEADER_BYTES + 2 * self.head_dim

    @property
    def words_offset(self) -> int:
        """Where the words of a section begin."""
        return _fixed_bytes(self.head_dim)

    @property
    def max_words(self) -> int:
        """Words that fit a section."""
        return (self.section_bytes - self.words_offset) // 2

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, everything included."""
        return self.section_bytes * self.num_kv_heads

    @property
    def steps(self) -> int:
        """Symbols that each lane reads: of every vector its scale, then its indices."""
        return 2 * self.page_tokens // LANES * (1 + self.head_dim)
