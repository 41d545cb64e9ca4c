"""Pages of layers that differ in size: joined from any parts, named by all codecs, in uniform blocks."""

import hashlib
import itertools
import random
from pathlib import Path

import pytest
from connectors.ranks import TP_SIZES, geometries, geometry_of, layer_splits, stages
from connectors.test_reshard import Store, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.model_layout import ModelLayout
from tq_connectors.parts import Division, Shard, shard_of
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels import PRESETS, PageLayout, preset
from tq_store.block import parse_header, verify_block
from tq_store.describe import describe_block
from tq_store.errors import ConfigError
from tq_store.keys import Part

DOCUMENT = Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md"
NAMES = ("tq4", "tq3", "k4v2", "raw")
TOKENS = range(32)


def layout_of(codec: str, geometry: CacheGeometry) -> ModelLayout:
    return ModelLayout.for_codec(
        codec,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        page_tokens=16,
    )


@st.composite
def tables(draw: st.DrawFn, geometry: CacheGeometry) -> ModelLayout:
    """Any of four presets in each layer."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=geometry.num_layers, max_size=geometry.num_layers))
    sizes = {"head_dim": geometry.head_dim, "num_kv_heads": geometry.num_kv_heads, "page_tokens": 16}
    return ModelLayout(tuple(PageLayout(spec=preset(name), **sizes) for name in names))


class MixedPages:
    """Random bytes for every section, of which any part's pages are cut out one by one."""

    def __init__(self, layout: ModelLayout, seed: int = 0) -> None:
        rng = random.Random(seed)
        self._sections = [
            [rng.randbytes(each.section_bytes) for _ in range(each.num_kv_heads)] for each in layout.by_layer
        ]

    def of(self, part: Part) -> bytes:
        heads = slice(part.first_kv_head, part.last_kv_head + 1)
        layers = self._sections[part.first_layer : part.last_layer + 1]
        return b"".join(section for layer in layers for section in layer[heads])


@settings(max_examples=40, deadline=None)
@given(st.data(), geometries())
def test_parts_of_any_division_join_to_whatever_is_wanted(
    data: st.DataObject, geometry: CacheGeometry
) -> None:
    layout = data.draw(tables(geometry))
    pages = MixedPages(layout)
    division = Division.for_ranks(
        geometry,
        tp_sizes=[data.draw(st.sampled_from(TP_SIZES))],
        layer_splits=[data.draw(layer_splits(geometry.num_layers))],
    )
    wanted = data.draw(parts_of(geometry))
    pieces = [(one, pages.of(one)) for one in division.loaded_by(Shard(wanted))]
    assert bytes(layout.join(data.draw(st.permutations(pieces)), wanted)) == pages.of(wanted)
    assert len(pages.of(geometry.whole)) == layout.page_bytes


@settings(max_examples=15, deadline=None)
@given(st.data(), geometries())
def test_stages_of_any_engine_load_what_stages_of_any_other_saved(
    data: st.DataObject, geometry: CacheGeometry
) -> None:
    layout = data.draw(tables(geometry))
    pages, store = [MixedPages(layout, seed) for seed in range(2)], Store()
    save_split, load_split = (data.draw(layer_splits(geometry.num_layers)) for _ in range(2))
    save_tp, load_tp = (data.draw(st.sampled_from(TP_SIZES[:3])) for _ in range(2))
    division = Division.for_ranks(geometry, tp_sizes=[save_tp], layer_splits=[save_split])

    def caches(tp_size: int, split: list[int]) -> list[tuple[Shard, PrefixCache]]:
        shards = [
            shard_of(geometry, tp_rank=rank, tp_size=tp_size, layers=layers)
            for layers in stages(split)
            for rank in range(tp_size)
        ]
        return [
            (
                shard,
                PrefixCache(
                    store,  # type: ignore[arg-type]
                    layout,
                    geometry,
                    model="m",
                    revision="1",
                    division=division,
                    shard=shard,
                ),
            )
            for shard in shards
        ]

    for shard, cache in caches(save_tp, save_split):
        for key, page in zip(cache.keys(TOKENS), pages, strict=True):
            assert cache.save(key, page.of(shard.part))
        cache.close()
    num_parts = len(division.cut_at(layout.layer_cuts).parts)
    assert len(store.blocks) == len(pages) * num_parts
    for shard, cache in caches(load_tp, load_split):
        loaded = [bytes(page) for page in cache.load(cache.keys(TOKENS))]
        assert loaded == [page.of(shard.part) for page in pages]
        cache.close()


def saved_blocks(codec: str, num_layers: int = 6) -> tuple[Store, ModelLayout]:
    geometry = geometry_of(num_layers, 2)
    layout, store = layout_of(codec, geometry), Store()
    cache = PrefixCache(store, layout, geometry, model="m", revision="1")  # type: ignore[arg-type]
    (key,) = cache.keys(TOKENS[:16])
    assert cache.save(key, MixedPages(layout).of(geometry.whole))
    cache.close()
    return store, layout


def test_a_block_holds_layers_of_one_codec_and_its_header_says_all_that_a_reader_needs() -> None:
    store, layout = saved_blocks("tq3+tq4:0,4-5")
    headers = [parse_header(block) for block in store.blocks.values()]
    assert [(each.first_layer, each.num_layers, each.key_code) for each in headers] == [
        (0, 1, 4),
        (1, 3, 3),
        (4, 2, 4),
    ]
    for header, block, key in zip(headers, store.blocks.values(), store.blocks, strict=True):
        verify_block(block, key)
        own = layout.by_layer[header.first_layer]
        assert (header.codec_fingerprint, header.page_bytes) == (own.spec.fingerprint, own.page_bytes)
    is_sound, text = describe_block([*store.blocks.values()][1])
    assert is_sound
    assert "layers       1 to 3" in text
    assert "key_code 3, value_code 3" in text


@pytest.mark.parametrize("codec", PRESETS)
def test_layers_of_one_codec_make_the_block_and_the_namespace_that_they_always_made(codec: str) -> None:
    geometry = geometry_of(6, 2)
    layout = PageLayout(spec=preset(codec), head_dim=16, num_kv_heads=2, page_tokens=16)
    uniform = ModelLayout.of(layout, 6)
    assert layout_of(codec, geometry) == uniform == ModelLayout.of(uniform, 6)
    assert (uniform.fingerprint, uniform.layer_cuts) == (layout.spec.fingerprint, (0, 6))
    namespaces = {namespace_for(each, geometry, model="m", revision="1") for each in (layout, uniform)}
    assert [each.codec_fingerprint for each in namespaces] == [layout.spec.fingerprint.hex()]
    store, _ = saved_blocks(codec)
    ((key, _),) = store.blocks.items()
    cache = PrefixCache(store, layout, geometry, model="m", revision="1")  # type: ignore[arg-type]
    assert cache.keys(TOKENS[:16]) == [key]
    cache.close()


def test_equal_tables_are_one_namespace_whatever_they_are_called_and_others_never_are() -> None:
    geometry = geometry_of(4, 2)
    for names in (("tq3+tq4:1,0", "tq4+tq3:2-3"), ("tq3+tq4:0-3", "tq4"), ("k4v3+raw:3", "raw+k4v3:0-2")):
        one, other = (layout_of(name, geometry) for name in names)
        assert (one, one.fingerprint) == (other, other.fingerprint)
    every = [
        ModelLayout(tuple(layout_of(name, geometry_of(1, 2)).by_layer[0] for name in names))
        for names in itertools.product(NAMES, repeat=4)
    ]
    assert len({each.fingerprint for each in every}) == len(NAMES) ** 4


def test_a_reader_with_another_table_misses() -> None:
    store, _ = saved_blocks("tq3+tq4:0")
    geometry = geometry_of(6, 2)
    for codec, num_pages in (("tq3+tq4:0", 1), ("tq4+tq3:1-5", 1), ("tq3", 0), ("tq3+tq4:1", 0), ("tq4", 0)):
        cache = PrefixCache(
            store,
            layout_of(codec, geometry),
            geometry,
            model="m",
            revision="1",  # type: ignore[arg-type]
        )
        assert len([*cache.load(cache.keys(TOKENS[:16]))]) == num_pages
        cache.close()


def test_the_document_tells_how_a_table_is_named() -> None:
    geometry = geometry_of(3, 1, 64)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert layout_of("tq3+tq4:0", geometry).fingerprint.hex() in text
    three, four = (preset(name).fingerprint for name in ("tq3", "tq4"))
    expected = hashlib.sha256(b"tq-store codec by layer v1" + four + three + three).digest()
    assert layout_of("tq3+tq4:0", geometry).fingerprint == expected


def test_one_run_is_not_copied() -> None:
    geometry = geometry_of(5, 2)
    layout = layout_of("tq3+raw:0", geometry)
    pages = MixedPages(layout).of(geometry.whole)
    wanted = Part(first_layer=2, num_layers=2, first_kv_head=0, num_kv_heads=2)
    joined = layout.join([(geometry.whole, pages)], wanted)
    assert joined.obj is pages
    both = Part(first_layer=0, num_layers=2, first_kv_head=0, num_kv_heads=2)
    assert layout.join([(geometry.whole, pages)], both).obj is not pages


def test_what_does_not_fit_is_refused() -> None:
    geometry = geometry_of(3, 2)
    layout = layout_of("tq3+tq4:0", geometry)
    pages, whole = MixedPages(layout).of(geometry.whole), geometry.whole
    first = Part(first_layer=0, num_layers=1, first_kv_head=0, num_kv_heads=2)
    for wrong in (pages[:-1], pages + b"x"):
        with pytest.raises(ValueError, match=f"have {len(pages)} bytes, not {len(wrong)}"):
            layout.join([(whole, wrong)], whole)
    with pytest.raises(ValueError, match="do not make up"):
        layout.join([], whole)
    with pytest.raises(ValueError, match="something in common"):
        layout.join([(whole, pages), (whole, pages)], first)
    with pytest.raises(ValueError, match="does not lie within the model's 3 layers"):
        layout.join([(whole, pages)], Part(first_layer=2, num_layers=2, first_kv_head=0, num_kv_heads=2))
    with pytest.raises(ValueError, match="not laid out alike"):
        layout.within_run(whole)
    with pytest.raises(ValueError, match="3 page layouts are not one for each of 4 layers"):
        ModelLayout.of(layout, 4)
    with pytest.raises(ValueError, match="nothing but their codec"):
        ModelLayout(())
    with pytest.raises(ValueError, match="nothing but their codec"):
        ModelLayout((layout.by_layer[0], layout_of("tq3", geometry_of(1, 4)).by_layer[0]))
    with pytest.raises(ValueError, match="unknown preset 'tq9'"):
        layout_of("tq3+tq9:0", geometry)
    with pytest.raises(ConfigError, match="names layer 3, and the model has 3 layers"):
        layout_of("tq3+tq4:3", geometry)
