"""Hypothesis strategies for what the store is made of: namespaces, token ids, block fields, blocks."""

import random

from hypothesis import strategies as st

from tq_store.block import BlockInfo, pack_block
from tq_store.keys import DIGEST_BYTES, Namespace

MAX_PAYLOAD_BYTES = 4 * 4 * 8 * 64

digests = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)

_names = st.text(min_size=1, max_size=12)
_maybe_names = st.text(max_size=12)
_counts = st.integers(1, 2**20)


def namespaces() -> st.SearchStrategy[Namespace]:
    """Valid namespaces, any text in their names."""
    return st.builds(
        Namespace,
        model=_names,
        revision=_names,
        kv_dtype=_names,
        codec_fingerprint=_names,
        codec_state=_maybe_names,
        page_tokens=st.integers(1, 8),
        num_layers=_counts,
        num_kv_heads=_counts,
        head_dim=_counts,
        salt=_maybe_names,
    )


def _uints(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


@st.composite
def block_infos(draw: st.DrawFn) -> BlockInfo:
    """Valid fields over their whole range, with a payload of at most `MAX_PAYLOAD_BYTES`."""
    num_kv_heads = draw(st.integers(1, 8))
    total_kv_heads = draw(st.integers(num_kv_heads, 2**16 - 1))
    pages_per_layer = draw(st.integers(1, 4))
    page_tokens = draw(st.integers(1, (2**32 - 1) // pages_per_layer))
    return BlockInfo(
        namespace=draw(digests),
        prefix_hash=draw(digests),
        codec_fingerprint=draw(digests),
        rotation_seed=draw(_uints(64)),
        codec_id=draw(_uints(16)),
        packing_id=draw(_uints(16)),
        key_code=draw(_uints(8)),
        value_code=draw(_uints(8)),
        rotation_id=draw(_uints(8)),
        key_center=draw(_uints(8)),
        page_bytes=num_kv_heads * draw(st.integers(1, 64)),
        num_tokens=pages_per_layer * page_tokens,
        page_tokens=page_tokens,
        head_dim=draw(st.integers(1, 2**16 - 1)),
        first_layer=draw(_uints(16)),
        num_layers=draw(st.integers(1, 4)),
        first_kv_head=draw(st.integers(0, total_kv_heads - num_kv_heads)),
        num_kv_heads=num_kv_heads,
        total_kv_heads=total_kv_heads,
    )


@st.composite
def payloads(draw: st.DrawFn, info: BlockInfo) -> bytes:
    """Bytes of the length that the fields ask for; from a seed, because drawing each byte is slow."""
    return random.Random(draw(st.integers(0, 2**16))).randbytes(info.payload_bytes)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[BlockInfo, bytes]:
    """Valid fields and a whole block that has them."""
    info = draw(block_infos())
    return info, pack_block(info, draw(payloads(info)))
