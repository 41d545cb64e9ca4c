"""An object of an engine's as a block: its layout in words, then its bytes, under the block's checksums."""

import struct
from dataclasses import dataclass

from tq_store.block import HEADER_BYTES, BlockInfo, Buffer, pack_block, parse_header, payload_of
from tq_store.errors import IdentityMismatch, InvalidHeader
from tq_store.keys import BlockKey, split_key

OBJECT_CODEC_ID = 3
"""A block whose payload is one object as described here; `proto/BLOCK_FORMAT.md` lists it."""
MAX_LAYOUT_BYTES = 4096
_LENGTH = struct.Struct("<I")
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a block held.

    Args:
        layout: The object's layout, as its writer described it.
        data: Its bytes; a view into the block.
    """

    layout: str
    data: memoryview


def pack_object(key: BlockKey, layout: str, data: Buffer) -> bytes:
    """Block from an object.

    Raises:
        BlockFormatError: Too large for a block, or a layout that takes more than 4096 bytes to describe.
    """
    text = layout.encode()
    if len(text) > MAX_LAYOUT_BYTES:
        raise InvalidHeader(f"a layout of {len(text)} bytes is over {MAX_LAYOUT_BYTES}")
    head = (_LENGTH.pack(len(text)) + text).ljust(_data_offset(len(text)), b"\0")
    info = _info(key, len(head) + memoryview(data).nbytes)
    return pack_block(info, b"".join((head, data)))


def unpack_object(key: BlockKey, block: Buffer) -> StoredObject:
    """Object from a block whose checksums have been verified.

    Raises:
        BlockFormatError: Not what `pack_object` makes for this key; such a block is a miss.
    """
    if parse_header(block) != _info(key, len(block) - HEADER_BYTES):
        raise IdentityMismatch("the block does not hold an object of this key")
    payload = payload_of(block)
    if len(payload) < _LENGTH.size:
        raise InvalidHeader("the payload is too short for an object")
    (length,) = _LENGTH.unpack_from(payload)
    if length > MAX_LAYOUT_BYTES or _data_offset(length) > len(payload):
        raise InvalidHeader(f"an object with a layout of {length} bytes does not fit its block")
    try:
        layout = str(payload[_LENGTH.size : _LENGTH.size + length], "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidHeader("the layout of the object is not text") from error
    return StoredObject(layout, payload[_data_offset(length) :])


def _data_offset(text_bytes: int) -> int:
    return -(-(_LENGTH.size + text_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _info(key: BlockKey, payload_bytes: int) -> BlockInfo:
    """The header of an object, whose geometry says nothing but its size."""
    namespace, prefix_hash = split_key(key)
    return BlockInfo(
        namespace=namespace,
        prefix_hash=prefix_hash,
        codec_fingerprint=bytes(32),
        rotation_seed=0,
        codec_id=OBJECT_CODEC_ID,
        packing_id=0,
        key_code=0,
        value_code=0,
        rotation_id=0,
        key_center=0,
        page_bytes=payload_bytes,
        num_tokens=1,
        page_tokens=1,
        head_dim=1,
        first_layer=0,
        num_layers=1,
        first_kv_head=0,
        num_kv_heads=1,
        total_kv_heads=1,
    )
