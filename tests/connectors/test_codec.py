"""Page layouts to headers and back."""

import dataclasses

import pytest

from tq_connectors.codec import CacheGeometry, block_info, namespace_for, pack_pages, unpack_pages
from tq_kernels import PRESETS, PageLayout, preset
from tq_store.block import HEADER_BYTES, verify_block
from tq_store.errors import BlockFormatError, IdentityMismatch
from tq_store.keys import BlockKey, block_keys

LAYERS = 3
GEOMETRY = CacheGeometry(num_layers=LAYERS, num_kv_heads=2, head_dim=64, kv_dtype="float32")


def layout_of(name: str, **changes: int) -> PageLayout:
    sizes = {"head_dim": 64, "num_kv_heads": 2, "page_tokens": 64} | changes
    return PageLayout(spec=preset(name), **sizes)


def key_for(layout: PageLayout, revision: str = "1") -> BlockKey:
    namespace = namespace_for(layout, GEOMETRY, model="m", revision=revision)
    return block_keys(namespace, range(layout.page_tokens))[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_block_gives_back_its_pages_and_verifies_under_its_key(name):
    layout = layout_of(name)
    key, pages = key_for(layout), bytes(i % 251 for i in range(LAYERS * layout.page_bytes))
    block = pack_pages(layout, LAYERS, key, pages)
    assert verify_block(block, key).payload_bytes == len(pages)
    assert len(block) == HEADER_BYTES + len(pages)
    assert bytes(unpack_pages(layout, LAYERS, key, block)) == pages


def test_the_header_holds_every_parameter_of_the_codec():
    layout = layout_of("k3v2")
    info = block_info(layout, LAYERS, key_for(layout))
    assert (info.key_code, info.value_code, info.key_center, info.rotation_id) == (3, 2, 1, 1)
    assert info.codec_fingerprint == layout.spec.fingerprint
    assert info.rotation_seed == layout.spec.rotation_seed
    assert (info.page_bytes, info.num_tokens, info.head_dim) == (layout.page_bytes, 64, 64)
    assert (info.num_layers, info.num_kv_heads, info.total_kv_heads) == (LAYERS, 2, 2)


def test_every_preset_every_size_and_every_revision_is_a_namespace_of_its_own():
    keys = [key_for(layout_of(name)) for name in PRESETS]
    keys.append(key_for(layout_of("tq4", page_tokens=128)))
    keys.append(key_for(layout_of("tq4"), revision="2"))
    salted = namespace_for(layout_of("tq4"), GEOMETRY, model="m", revision="1", salt="tenant")
    keys.append(block_keys(salted, range(64))[0])
    for change in ({"kv_dtype": "float16"}, {"num_layers": 4}, {"num_kv_heads": 4}, {"head_dim": 32}):
        other = dataclasses.replace(GEOMETRY, **change)
        keys.append(block_keys(namespace_for(layout_of("tq4"), other, model="m", revision="1"), range(64))[0])
    assert len({key[:32] for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "other", [layout_of("tq3"), layout_of("tq4", page_tokens=128), layout_of("tq4", num_kv_heads=1)]
)
def test_a_sound_block_of_another_codec_or_shape_is_refused(other):
    layout = layout_of("tq4")
    key = key_for(layout)
    block = pack_pages(other, LAYERS, key, bytes(LAYERS * other.page_bytes))
    verify_block(block, key)
    with pytest.raises(IdentityMismatch):
        unpack_pages(layout, LAYERS, key, block)
    with pytest.raises(BlockFormatError):
        unpack_pages(
            layout, LAYERS + 1, key, pack_pages(layout, LAYERS, key, bytes(LAYERS * layout.page_bytes))
        )
