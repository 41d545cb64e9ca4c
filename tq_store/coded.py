"""Coded block, version 1: a 56-byte header, then a block compressed; `proto/BLOCK_FORMAT.md` in code.

For media where bytes cost more than a core: codes of a page are 3 to 8 % longer than their entropy, no more.
Whoever reads a medium takes coded and plain blocks alike, so the setting may change while blocks stay.
"""

import struct

import xxhash
import zstandard

from tq_store.block import HEADER_BYTES, MAX_BLOCK_BYTES, Buffer
from tq_store.errors import ChecksumMismatch, InvalidHeader, LengthMismatch, NotABlock, UnsupportedVersion

MAGIC = b"\x89TQC\r\n\x1a\n"
FORMAT_VERSION = 1
ZSTD = 1
"""The only coder so far: one Zstandard frame that states its content size, without a dictionary."""
MAX_WINDOW_BYTES = 8 << 20
"""What a frame may ask a reader to keep; level 1 asks for half a MiB."""
CODED_LAYOUT = {
    "magic": (0, "8s"),
    "format_version": (8, "H"),
    "coder": (10, "H"),
    "reserved": (12, "I"),
    "raw_bytes": (16, "Q"),
    "coded_bytes": (24, "Q"),
    "raw_checksum": (32, "16s"),
    "header_checksum": (48, "Q"),
}
"""Offset and struct code of every field."""

_HEAD = struct.Struct("<" + "".join(code for _, code in CODED_LAYOUT.values()))
CODED_HEADER_BYTES = _HEAD.size
_CHECKED_BYTES = CODED_LAYOUT["header_checksum"][0]
_LEVEL = 1  # higher levels look for repetitions, and there are none


def is_coded(data: Buffer) -> bool:
    """Whether bytes claim to be a coded block."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def pack_coded(block: Buffer) -> bytes:
    """A block coded, or as it is where that would not be shorter. A contiguous buffer; not looked into."""
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(block)
    if CODED_HEADER_BYTES + len(frame) >= len(block):
        return bytes(block)
    fields = (FORMAT_VERSION, ZSTD, 0, len(block), len(frame), xxhash.xxh3_128_digest(block))
    head = _HEAD.pack(MAGIC, *fields, 0)[:_CHECKED_BYTES]
    return b"".join((head, struct.pack("<Q", xxhash.xxh3_64_intdigest(head)), frame))


def unpack_coded(data: Buffer) -> bytes:
    """The block inside: the bytes that were coded, whether or not they are a sound block.

    Raises:
        NotABlock: Not a coded block.
        LengthMismatch, UnsupportedVersion, ChecksumMismatch, InvalidHeader: As for blocks.
    """
    view = memoryview(data).cast("B")
    if not is_coded(view):
        raise NotABlock("the bytes do not start with the magic of a coded block")
    if len(view) < CODED_HEADER_BYTES:
        raise LengthMismatch(f"a coded block starts with {CODED_HEADER_BYTES} bytes, here are {len(view)}")
    _, version, coder, reserved, raw_bytes, coded_bytes, checksum, head_checksum = _HEAD.unpack_from(view)
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(f"coded block version {version}; this reader knows {FORMAT_VERSION}")
    if xxhash.xxh3_64_intdigest(view[:_CHECKED_BYTES]) != head_checksum:
        raise ChecksumMismatch("the header of the coded block differs from what was written")
    if coder != ZSTD or reserved:
        raise UnsupportedVersion("the coded block uses a coder or features that this reader does not know")
    if not HEADER_BYTES <= raw_bytes <= MAX_BLOCK_BYTES:
        raise InvalidHeader(
            f"a block of {raw_bytes} bytes cannot be: {HEADER_BYTES} to {MAX_BLOCK_BYTES} can"
        )
    frame = view[CODED_HEADER_BYTES:]
    if len(frame) != coded_bytes:
        raise LengthMismatch(f"{len(frame)} coded bytes, the header says {coded_bytes}")
    block = _decompressed(frame, raw_bytes)
    if xxhash.xxh3_128_digest(block) != checksum:
        raise ChecksumMismatch("the block differs from what was coded")
    return block


def _decompressed(frame: memoryview, raw_bytes: int) -> bytes:
    try:
        stated = zstandard.get_frame_parameters(frame)
        if stated.content_size != raw_bytes or stated.window_size > MAX_WINDOW_BYTES or stated.dict_id:
            raise InvalidHeader("the Zstandard frame is not one that a writer of coded blocks makes")
        return zstandard.ZstdDecompressor().decompress(frame, raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChecksumMismatch(f"the coded bytes cannot be decompressed: {error}") from None
