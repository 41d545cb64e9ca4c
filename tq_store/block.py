"""Block format, version 1: a 256-byte header, then the payload. `proto/BLOCK_FORMAT.md` is the same in words.

A block is immutable and names itself: whose it is (namespace, prefix), what it holds (geometry, codec) and
what its bytes must hash to. A reader trusts nothing that it has not checked, and checks sizes before use.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from tq_store.errors import (
    ChecksumMismatch,
    IdentityMismatch,
    InvalidHeader,
    LengthMismatch,
    NotABlock,
    UnsupportedVersion,
)
from tq_store.keys import DIGEST_BYTES, BlockKey, split_key

MAGIC = b"\x89TQB\r\n\x1a\n"
"""Not text, and changed by any transfer that converts line ends or drops the eighth bit."""
FORMAT_VERSION = 1
HEADER_BYTES = 256
MAX_PAYLOAD_BYTES = 256 << 20
MAX_BLOCK_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """What a block says about itself. Field order is byte order; `proto/BLOCK_FORMAT.md` explains each.

    The codec numbers are opaque here; `tq_connectors.codec` gives them their meaning.
    """

    namespace: bytes
    prefix_hash: bytes
    codec_fingerprint: bytes
    rotation_seed: int
    codec_id: int
    packing_id: int
    key_code: int
    value_code: int
    rotation_id: int
    key_center: int
    page_bytes: int
    num_tokens: int
    page_tokens: int
    head_dim: int
    first_layer: int
    num_layers: int
    first_kv_head: int
    num_kv_heads: int
    total_kv_heads: int

    def __post_init__(self) -> None:
        for name in ("namespace", "prefix_hash", "codec_fingerprint"):
            if len(getattr(self, name)) != DIGEST_BYTES:
                raise InvalidHeader(f"{name} must have {DIGEST_BYTES} bytes, not {len(getattr(self, name))}")
        for name, limit in _INFO_LIMITS.items():
            if not 0 <= getattr(self, name) < limit:
                raise InvalidHeader(f"{name} is {getattr(self, name)}, outside [0, {limit})")
        for name in ("page_bytes", "num_tokens", "page_tokens", "head_dim", "num_layers", "num_kv_heads"):
            if getattr(self, name) == 0:
                raise InvalidHeader(f"{name} is 0")
        if self.num_tokens % self.page_tokens:
            raise InvalidHeader(f"{self.num_tokens} tokens are not whole pages of {self.page_tokens}")
        if self.page_bytes % self.num_kv_heads:
            raise InvalidHeader(
                f"a page of {self.page_bytes} bytes does not divide into {self.num_kv_heads} heads"
            )
        if self.first_kv_head + self.num_kv_heads > self.total_kv_heads:
            raise InvalidHeader(
                f"heads {self.first_kv_head} to {self.first_kv_head + self.num_kv_heads} "
                f"do not lie within {self.total_kv_heads}"
            )
        if self.payload_bytes > MAX_PAYLOAD_BYTES:
            raise InvalidHeader(f"payload of {self.payload_bytes} bytes is over {MAX_PAYLOAD_BYTES}")

    @property
    def pages_per_layer(self) -> int:
        """Pages that each layer contributes."""
        return self.num_tokens // self.page_tokens

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header: pages of the first layer in token order, then of the next layer."""
        return self.num_layers * self.pages_per_layer * self.page_bytes

    @property
    def key(self) -> BlockKey:
        """The key under which this block is stored."""
        return BlockKey(self.namespace + self.prefix_hash)


_INFO_FORMATS = {
    "namespace": "32s",
    "prefix_hash": "32s",
    "codec_fingerprint": "32s",
    "rotation_seed": "Q",
    "codec_id": "H",
    "packing_id": "H",
    "key_code": "B",
    "value_code": "B",
    "rotation_id": "B",
    "key_center": "B",
    "page_bytes": "I",
    "num_tokens": "I",
    "page_tokens": "I",
    "head_dim": "H",
    "first_layer": "H",
    "num_layers": "H",
    "first_kv_head": "H",
    "num_kv_heads": "H",
    "total_kv_heads": "H",
}
_INFO_LIMITS = {
    name: 1 << (8 * struct.calcsize("<" + code)) for name, code in _INFO_FORMATS.items() if code != "32s"
}
_PROLOGUE_FORMATS = {
    "magic": "8s",
    "format_version": "H",
    "header_bytes": "H",
    "flags": "I",
    "payload_bytes": "Q",
    "payload_checksum": "16s",
}
_PROLOGUE = struct.Struct("<" + "".join(_PROLOGUE_FORMATS.values()))
_INFO = struct.Struct("<" + "".join(_INFO_FORMATS.values()))
_RESERVED_BYTES = HEADER_BYTES - 8 - _PROLOGUE.size - _INFO.size
_CHECKSUM = struct.Struct("<Q")


def _layout() -> dict[str, tuple[int, str]]:
    """Offset and struct code of every header field, in byte order."""
    formats = {
        **_PROLOGUE_FORMATS,
        **_INFO_FORMATS,
        "reserved": f"{_RESERVED_BYTES}s",
        "header_checksum": "Q",
    }
    layout, offset = {}, 0
    for name, code in formats.items():
        layout[name] = (offset, code)
        offset += struct.calcsize("<" + code)
    return layout


HEADER_LAYOUT = _layout()
_OWN = slice(HEADER_LAYOUT["payload_checksum"][0], HEADER_LAYOUT["codec_fingerprint"][0])
"""What a header says of one block alone: the payload's checksum and the key."""
_LOCKED_BYTES = 256 << 10
_LOCKED_RUN_BYTES = 64 << 10
"""xxhash lets go of the interpreter's lock for more than this at once."""


class BlockKind:
    """Blocks that differ in key and payload alone, as those of one engine's pages do: described once for all.

    Args:
        info: Of any of them.
    """

    def __init__(self, info: BlockInfo) -> None:
        self.payload_bytes = info.payload_bytes
        head = (
            _PROLOGUE.pack(MAGIC, FORMAT_VERSION, HEADER_BYTES, 0, info.payload_bytes, b"")
            + _INFO.pack(*(getattr(info, field.name) for field in fields(info)))
            + bytes(_RESERVED_BYTES)
        )
        self._before, self._after = head[: _OWN.start], head[_OWN.stop :]

    def pack_header(self, key: BlockKey, pieces: Sequence[memoryview]) -> bytes:
        """Header of the block with this key and payload; equal to that of a block which is just this.

        Args:
            key: The block's.
            pieces: The payload, cut anywhere, as bytes.

        Raises:
            LengthMismatch: The payload is not as long as the geometry says.
            ValueError: `key` is not a block key.
        """
        num_bytes = sum(map(len, pieces))
        if num_bytes != self.payload_bytes:
            raise LengthMismatch(f"payload has {num_bytes} bytes, its geometry says {self.payload_bytes}")
        return self._header(key, _checksum(pieces))

    def is_block(self, key: BlockKey, data: memoryview) -> bool:
        """Whether bytes are the sound block with this key, as `verify_block` would say, and of this kind."""
        if len(data) != HEADER_BYTES + self.payload_bytes:
            return False
        return data[:HEADER_BYTES] == self._header(key, _checksum([data[HEADER_BYTES:]]))

    def _header(self, key: BlockKey, checksum: bytes) -> bytes:
        head = b"".join((self._before, checksum, *split_key(key), self._after))
        return head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head))


def _checksum(pieces: Sequence[memoryview]) -> bytes:
    """XXH3 of bytes that lie in several places.

    Having the interpreter's lock back takes time where others want it, up to a switch interval beside a
    thread that never rests. So a few pieces of little are hashed with it, and the page of a model without.
    """
    state = xxhash.xxh3_128()
    run_bytes = _LOCKED_RUN_BYTES if sum(map(len, pieces)) <= _LOCKED_BYTES else MAX_PAYLOAD_BYTES
    for piece in pieces:
        for start in range(0, len(piece), run_bytes):
            state.update(piece[start : start + run_bytes])
    return state.digest()


def pack_header(info: BlockInfo, payload: Buffer) -> bytes:
    """Header for a payload; the block is the two joined, so that a payload need not be copied.

    Raises:
        LengthMismatch: The payload is not as long as the geometry says.
    """
    return BlockKind(info).pack_header(info.key, [memoryview(payload).cast("B")])


def pack_block(info: BlockInfo, payload: Buffer) -> bytes:
    """Header and payload in one piece."""
    return b"".join((pack_header(info, payload), payload))


def _parse(data: Buffer) -> tuple[BlockInfo, bytes]:
    """Checked header fields and the payload checksum they promise."""
    head = bytes(memoryview(data).cast("B")[:HEADER_BYTES])
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise NotABlock("the bytes do not start with the block magic")
    if len(head) < HEADER_BYTES:
        raise LengthMismatch(f"a block starts with a header of {HEADER_BYTES} bytes, here are {len(head)}")
    _, version, header_bytes, flags, payload_bytes, checksum = _PROLOGUE.unpack_from(head)
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(f"block format version {version}; this reader knows {FORMAT_VERSION}")
    (expected,) = _CHECKSUM.unpack_from(head, HEADER_BYTES - _CHECKSUM.size)
    if xxhash.xxh3_64_intdigest(head[: -_CHECKSUM.size]) != expected:
        raise ChecksumMismatch("the header differs from what was written")
    if flags or any(head[HEADER_BYTES - _CHECKSUM.size - _RESERVED_BYTES : -_CHECKSUM.size]):
        raise UnsupportedVersion("the block uses features that this reader does not know")
    values: tuple[Any, ...] = _INFO.unpack_from(head, _PROLOGUE.size)
    info = BlockInfo(**dict(zip(_INFO_FORMATS, values, strict=True)))
    if header_bytes != HEADER_BYTES or payload_bytes != info.payload_bytes:
        raise InvalidHeader(
            f"lengths {header_bytes} and {payload_bytes} contradict the geometry, "
            f"which gives {HEADER_BYTES} and {info.payload_bytes}"
        )
    return info, checksum


def parse_header(data: Buffer) -> BlockInfo:
    """Read and check the first 256 bytes; says nothing of the payload.

    Raises:
        BlockFormatError: As its subclasses say.
    """
    return _parse(data)[0]


def verify_block(data: Buffer, key: BlockKey | None = None) -> BlockInfo:
    """Check everything about a whole block: header, length, payload checksum, identity.

    Args:
        data: Header and payload, nothing more.
        key: The key it was asked for under; None skips the identity check.

    Raises:
        BlockFormatError: As its subclasses say.
        ValueError: `key` is not a block key.
    """
    if key is not None:
        split_key(key)
    info, checksum = _parse(data)
    payload = payload_of(data)
    if len(payload) != info.payload_bytes:
        raise LengthMismatch(f"payload has {len(payload)} bytes, the header says {info.payload_bytes}")
    if _checksum([payload]) != checksum:
        raise ChecksumMismatch("the payload differs from what was written")
    if key is not None and info.key != key:
        own, asked = (" ".join(part.hex()[:16] for part in split_key(each)) for each in (info.key, key))
        raise IdentityMismatch(f"this block is {own} (namespace, prefix), asked for was {asked}")
    return info


_BF16 = struct.Struct("<II5H")


def bf16_bytes(block: Buffer) -> int:
    """Bytes that the keys and values in a sound block would take as bf16."""
    offset = HEADER_LAYOUT["num_tokens"][0]
    sizes: tuple[int, ...] = _BF16.unpack_from(block, offset)
    num_tokens, _, head_dim, _, num_layers, _, num_kv_heads = sizes
    return 2 * 2 * num_tokens * head_dim * num_layers * num_kv_heads


def payload_of(data: Buffer) -> memoryview:
    """The payload of a block, without copying it."""
    return memoryview(data).cast("B")[HEADER_BYTES:]
