"""`tq_store.sizing` repeats what decides the size of a page; the layouts themselves say if it is right."""

import pytest

from tq_connectors.codec import CacheGeometry, namespace_for, pack_pages
from tq_connectors.model_layout import ModelLayout
from tq_connectors.parts import Division
from tq_kernels import spec
from tq_kernels.layout import PageLayout
from tq_store import sizing
from tq_store.keys import BlockKey


def model(num_layers: int, num_kv_heads: int, head_dim: int) -> sizing.Model:
    return sizing.Model(
        num_layers=num_layers,
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        active_weights=1,
    )


def test_every_preset_has_a_size_and_none_is_left_over() -> None:
    assert list(sizing.PRESETS) == list(spec.PRESETS)


@pytest.mark.parametrize("preset", spec.PRESETS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_tokens", [16, 32, 48, 64, 128])
def test_a_page_has_the_bytes_of_its_layout(preset: str, head_dim: int, page_tokens: int) -> None:
    for num_kv_heads in (1, 3, 8):
        layout = PageLayout(
            spec=spec.PRESETS[preset], head_dim=head_dim, num_kv_heads=num_kv_heads, page_tokens=page_tokens
        )
        assert sizing.page_bytes(model(2, num_kv_heads, head_dim), preset, page_tokens) == layout.page_bytes


def test_a_block_has_the_bytes_of_a_real_one() -> None:
    layout = PageLayout(spec=spec.preset("tq4"), head_dim=64, num_kv_heads=3, page_tokens=64)
    geometry = CacheGeometry(num_layers=5, num_kv_heads=3, head_dim=64, kv_dtype="bfloat16")
    namespace = namespace_for(layout, geometry, model="m", revision="r")
    key = BlockKey(namespace.digest() + bytes(32))
    block = pack_pages(layout, 5, key, bytes(5 * layout.page_bytes))
    assert sizing.block_bytes(model(5, 3, 64), "tq4", 64) == len(block)


def test_blocks_of_a_table_have_the_bytes_of_real_ones() -> None:
    codec, geometry = (
        "tq3+raw:0+tq4:3-4",
        CacheGeometry(num_layers=5, num_kv_heads=3, head_dim=64, kv_dtype="f"),
    )
    layout = ModelLayout.for_codec(codec, num_layers=5, num_kv_heads=3, head_dim=64, page_tokens=64)
    namespace = namespace_for(layout, geometry, model="m", revision="r")
    key, division = BlockKey(namespace.digest() + bytes(32)), Division.undivided(geometry)
    pages, sizes = bytes(layout.page_bytes), []
    for part in division.cut_at(layout.layer_cuts).parts:
        piece = layout.join([(geometry.whole, pages)], part)
        sizes.append(len(pack_pages(layout.within_run(part), 5, key, piece, part)))
    assert sizing.block_sizes(model(5, 3, 64), codec, 64) == tuple(sizes)
