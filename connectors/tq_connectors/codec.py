"""Page layouts to block headers and back: the one place where codec numbers get their meaning."""

from dataclasses import dataclass

from tq_connectors.model_layout import ModelLayout
from tq_kernels.layout import PageLayout
from tq_kernels.spec import CODEC_ID, PACKING_ID
from tq_store.block import BlockInfo, Buffer, pack_block, parse_header, payload_of
from tq_store.errors import IdentityMismatch
from tq_store.keys import BlockKey, Namespace, Part, part_key, split_key


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGeometry:
    """Shape of a whole model's KV cache, whatever the parallelism.

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

    @property
    def whole(self) -> Part:
        """All layers and all KV heads."""
        return Part(
            first_layer=0, num_layers=self.num_layers, first_kv_head=0, num_kv_heads=self.num_kv_heads
        )


def namespace_for(
    layout: PageLayout | ModelLayout, geometry: CacheGeometry, *, model: str, revision: str, salt: str = ""
) -> Namespace:
    """The namespace of blocks of one model under one layout of all its layers, or one of each."""
    layouts = ModelLayout.of(layout, geometry.num_layers)
    return Namespace(
        model=model,
        revision=revision,
        kv_dtype=geometry.kv_dtype,
        codec_fingerprint=layouts.fingerprint.hex(),
        page_tokens=layouts.page_tokens,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        salt=salt,
    )


def block_info(layout: PageLayout, num_layers: int, key: BlockKey, part: Part | None = None) -> BlockInfo:
    """Header fields of a block that holds one page of every layer, or a part of them.

    Args:
        layout: Page of a layer in this block, with all the model's KV heads.
        num_layers: Attention layers of the whole model.
        key: Key of the page with all layers and heads, which the block of a part does not bear itself.
        part: What the block holds; None for all layers and heads.

    Raises:
        ValueError: The part is not one of this model.
        InvalidHeader: So much does not fit a block.
    """
    whole = Part(first_layer=0, num_layers=num_layers, first_kv_head=0, num_kv_heads=layout.num_kv_heads)
    part = part or whole
    namespace, prefix_hash = split_key(part_key(key, part, whole))
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
        page_bytes=layout.section_bytes * part.num_kv_heads,
        num_tokens=layout.page_tokens,
        page_tokens=layout.page_tokens,
        head_dim=layout.head_dim,
        first_layer=part.first_layer,
        num_layers=part.num_layers,
        first_kv_head=part.first_kv_head,
        num_kv_heads=part.num_kv_heads,
        total_kv_heads=layout.num_kv_heads,
    )


def pack_pages(
    layout: PageLayout, num_layers: int, key: BlockKey, pages: Buffer, part: Part | None = None
) -> bytes:
    """Block from the page bytes of all layers, layer after layer, or of a part of them; see `block_info`."""
    return pack_block(block_info(layout, num_layers, key, part), pages)


def unpack_pages(
    layout: PageLayout, num_layers: int, key: BlockKey, block: Buffer, part: Part | None = None
) -> memoryview:
    """Page bytes from a block whose checksums have been verified, without a copy; see `block_info`.

    Raises:
        BlockFormatError: Not what `pack_pages` makes for these arguments; such a block is a miss.
    """
    info = parse_header(block)
    if info != block_info(layout, num_layers, key, part):
        raise IdentityMismatch(
            "the block was made by another codec or for another cache shape than its key promises"
        )
    return payload_of(block)
