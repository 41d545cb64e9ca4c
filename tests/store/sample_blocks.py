"""Small sound blocks to store: deterministic, cheap to make, told apart by a number."""

import hashlib
import random

from tq_store.block import HEADER_BYTES, BlockInfo, pack_block
from tq_store.keys import BlockKey

NAMESPACE = hashlib.sha256(b"model a").digest()
OTHER_NAMESPACE = hashlib.sha256(b"model b").digest()


def sample_key(number: int, namespace: bytes = NAMESPACE) -> BlockKey:
    return BlockKey(namespace + hashlib.sha256(number.to_bytes(8, "little")).digest())


def sample_block(
    number: int, payload_bytes: int = 256, namespace: bytes = NAMESPACE
) -> tuple[BlockKey, bytes]:
    key = sample_key(number, namespace)
    info = BlockInfo(
        namespace=namespace,
        prefix_hash=key[32:],
        codec_fingerprint=bytes(32),
        rotation_seed=number,
        codec_id=1,
        packing_id=1,
        key_code=4,
        value_code=4,
        rotation_id=1,
        key_center=0,
        page_bytes=payload_bytes,
        num_tokens=16,
        page_tokens=16,
        head_dim=64,
        first_layer=0,
        num_layers=1,
        first_kv_head=0,
        num_kv_heads=1,
        total_kv_heads=1,
    )
    return key, pack_block(info, random.Random(number).randbytes(payload_bytes))


def sample_blocks(
    count: int, payload_bytes: int = 256, namespace: bytes = NAMESPACE, first: int = 0
) -> list[tuple[BlockKey, bytes]]:
    return [sample_block(number, payload_bytes, namespace) for number in range(first, first + count)]


def block_bytes(payload_bytes: int) -> int:
    return HEADER_BYTES + payload_bytes


def keys_of(blocks: list[tuple[BlockKey, bytes]]) -> list[BlockKey]:
    return [key for key, _ in blocks]


def bytes_of(blocks: list[tuple[BlockKey, bytes]]) -> list[bytes]:
    return [block for _, block in blocks]
