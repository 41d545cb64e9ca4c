"""Sound blocks of any size for the store's benchmarks, told apart by a number and cheap to make."""

import hashlib
import random
from functools import lru_cache

from tq_store.block import HEADER_BYTES, BlockInfo, pack_block
from tq_store.keys import BlockKey

NAMESPACE = hashlib.sha256(b"benchmarks/store").digest()
_HEADS = 1


def bench_key(number: int) -> BlockKey:
    """Key of a block."""
    return BlockKey(NAMESPACE + hashlib.sha256(number.to_bytes(8, "little")).digest())


@lru_cache(maxsize=4)
def _payload(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def bench_block(number: int, block_bytes: int) -> tuple[BlockKey, bytes]:
    """A block of this length in all; those of one length share their payload."""
    key = bench_key(number)
    payload = _payload(block_bytes - HEADER_BYTES)
    info = BlockInfo(
        namespace=NAMESPACE,
        prefix_hash=key[len(NAMESPACE) :],
        codec_fingerprint=bytes(32),
        rotation_seed=0,
        codec_id=1,
        packing_id=1,
        key_code=4,
        value_code=4,
        rotation_id=1,
        key_center=1,
        page_bytes=len(payload),
        num_tokens=64,
        page_tokens=64,
        head_dim=128,
        first_layer=0,
        num_layers=1,
        first_kv_head=0,
        num_kv_heads=_HEADS,
        total_kv_heads=_HEADS,
    )
    return key, pack_block(info, payload)
