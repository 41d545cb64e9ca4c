"""Page layouts to block headers and back: the one place where codec numbers get their meaning."""

from dataclasses import dataclass

from tq_kernels.layout import PageLayout
from tq_kernels.spec import CODEC_ID, PACKING_ID
from tq_store.block import BlockInfo, Buffer, pack_block, parse_header, payload_of
from tq_store.errors import IdentityMismatch
from tq_store.keys import BlockKey, Namespace, split_key


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGeometry:
    """Shape of a model's KV cache.

    Args:
        num_layers: Attention layers.
        num_kv_heads: KV heads of each.
        head_dim: Channels of a key and of a value.
        kv_dtype: Name of the dtype before the codec, e.g. ``"bfloat16"``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str


def namespace_for(
    layout: PageLayout, geometry: CacheGeometry, *, model: str, revision: str, salt: str = ""
) -> Namespace:
    """The namespace of blocks of one model under one layout."""
    return Namespace(
        model=model,
        revision=revision,
        kv_dtype=geometry.kv_dtype,
        codec_fingerprint=layout.spec.fingerprint.hex(),
        page_tokens=layout.page_tokens,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        salt=salt,
    )


def block_info(layout: PageLayout, num_layers: int, key: BlockKey) -> BlockInfo:
    """Header fields of a block that holds one page of every layer."""
    namespace, prefix_hash = split_key(key)
    return BlockInfo(
        namespace=namespace,
        prefix_hash=prefix_hash,
        codec_fingerprint=layout.spec.fingerprint,
        rotation_seed=layout.spec.rotation_seed,
        codec_id=CODEC_ID,
        packing_id=PACKING_ID,
        key_code=layout.spec.key,
        value_code=layout.spec.value,
        rotation_id=layout.spec.rotation,
        key_center=layout.spec.key_center,
        page_bytes=layout.page_bytes,
        num_tokens=layout.page_tokens,
        page_tokens=layout.page_tokens,
        head_dim=layout.head_dim,
        first_layer=0,
        num_layers=num_layers,
        first_kv_head=0,
        num_kv_heads=layout.num_kv_heads,
        total_kv_heads=layout.num_kv_heads,
    )


def pack_pages(layout: PageLayout, num_layers: int, key: BlockKey, pages: Buffer) -> bytes:
    """Block from the page bytes of all layers, layer after layer."""
    return pack_block(block_info(layout, num_layers, key), pages)


def unpack_pages(layout: PageLayout, num_layers: int, key: BlockKey, block: Buffer) -> memoryview:
    """Page bytes of all layers from a block whose checksums have been verified, without a copy.

    Raises:
        BlockFormatError: Not what `pack_pages` makes for this layout and key; such a block is a miss.
    """
    info = parse_header(block)
    if info != block_info(layout, num_layers, key):
        raise IdentityMismatch(
            "the block was made by another codec or for another cache shape than its key promises"
        )
    return payload_of(block)
