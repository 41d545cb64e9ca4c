"""Pages cut and joined: what one engine's ranks save is what any other engine's ranks hold, byte for byte."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from connectors.ranks import TP_SIZES, ModelPages, geometries, geometry_of, layer_splits, stages
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_connectors.codec import CacheGeometry, block_info, pack_pages, unpack_pages
from tq_connectors.parts import Division, Shard, shard_of
from tq_connectors.prefix_cache import PrefixCache
from tq_connectors.reshard import join_pages, runs, slice_pages
from tq_kernels import PageLayout, preset
from tq_store.block import parse_header, verify_block
from tq_store.errors import ConfigError, IdentityMismatch, RpcUnavailable
from tq_store.keys import BlockKey, Part, part_key
from tq_store.results import PutOutcome

SIZES = {"section_bytes": 3}
NUM_PAGES = 3
TOKENS = range(16 * NUM_PAGES)
KEY = BlockKey(bytes(range(64)))


def part(first_layer: int, num_layers: int, first_kv_head: int, num_kv_heads: int) -> Part:
    return Part(
        first_layer=first_layer,
        num_layers=num_layers,
        first_kv_head=first_kv_head,
        num_kv_heads=num_kv_heads,
    )


def layout_of(geometry: CacheGeometry) -> PageLayout:
    return PageLayout(spec=preset("tq2"), head_dim=16, num_kv_heads=geometry.num_kv_heads, page_tokens=16)


def shards_of(geometry: CacheGeometry, tp_size: int, split: Sequence[int] = ()) -> list[Shard]:
    """Of all ranks of an engine."""
    return [
        shard_of(geometry, tp_rank=rank, tp_size=tp_size, layers=layers)
        for layers in stages(list(split) or [geometry.num_layers])
        for rank in range(tp_size)
    ]


class Store:
    """Sound blocks in a dict; a second put of a key would be a second saver of one part."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, bytes] = {}

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        return sum(1 for _ in itertools.takewhile(self.blocks.__contains__, keys))

    def get(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, bytes | None]]:
        return ((index, self.blocks.get(key)) for index, key in enumerate(keys))

    def put(self, blocks: Sequence[tuple[BlockKey, bytes]]) -> list[PutOutcome]:
        for key, block in blocks:
            verify_block(block, key)
            assert key not in self.blocks
            self.blocks[key] = block
        return [PutOutcome.STORED] * len(blocks)


@contextmanager
def cache_of(
    store: object, geometry: CacheGeometry, shard: Shard | None = None, division: Division | None = None
) -> Iterator[PrefixCache]:
    """A rank's view of the store; at the end everything is saved."""
    layout = layout_of(geometry)
    cache = PrefixCache(
        store,
        layout,
        geometry,
        model="m",
        revision="1",
        division=division,
        shard=shard,  # type: ignore[arg-type]
    )
    yield cache
    cache.close()
    assert (cache.saves.failed_blocks, cache.saves.dropped_blocks) == (0, 0)


def save(
    store: Store, geometry: CacheGeometry, shards: list[Shard], division: Division, pages: list[ModelPages]
) -> None:
    """What the ranks of an engine do."""
    for shard in shards:
        with cache_of(store, geometry, shard, division) as cache:
            for key, page in zip(cache.keys(TOKENS), pages, strict=True):
                assert cache.save(key, page.of(shard.part))


def load(
    store: Store, geometry: CacheGeometry, shards: list[Shard], division: Division | None
) -> list[list[bytes]]:
    """Pages that each rank of an engine gets."""
    loaded = []
    for shard in shards:
        with cache_of(store, geometry, shard, division) as cache:
            keys = cache.keys(TOKENS)
            loaded.append([bytes(pages) for pages in cache.load(keys)])
            assert cache.lookup(keys) == len(loaded[-1]) == cache.counters.loaded_pages
            assert cache.counters.failed_pages == 0
    return loaded


def pages_of(geometry: CacheGeometry, num_pages: int = NUM_PAGES) -> list[ModelPages]:
    section_bytes = layout_of(geometry).section_bytes
    return [ModelPages(geometry, section_bytes, seed=seed) for seed in range(num_pages)]


def held(shards: list[Shard], pages: list[ModelPages]) -> list[list[bytes]]:
    return [[page.of(shard.part) for page in pages] for shard in shards]


@st.composite
def parts_of(draw: st.DrawFn, geometry: CacheGeometry) -> Part:
    layer, head = (draw(st.integers(0, n - 1)) for n in (geometry.num_layers, geometry.num_kv_heads))
    num_layers = draw(st.integers(1, geometry.num_layers - layer))
    return part(layer, num_layers, head, draw(st.integers(1, geometry.num_kv_heads - head)))


@settings(deadline=None)
@given(st.data(), geometries(), st.integers(1, 3))
def test_a_slice_is_what_a_rank_with_that_part_holds(
    data: st.DataObject, geometry: CacheGeometry, pages_per_layer: int
) -> None:
    pages, sizes = ModelPages(geometry, 3, pages_per_layer), SIZES | {"pages_per_layer": pages_per_layer}
    one = data.draw(parts_of(geometry))
    sliced = slice_pages(pages.of(geometry.whole), geometry.whole, one, **sizes)
    assert bytes(sliced) == pages.of(one)
    other = data.draw(parts_of(geometry))
    common = one.overlap(other)
    assert common == other.overlap(one)
    if common:
        assert bytes(slice_pages(sliced, one, common, **sizes)) == pages.of(common)
    else:
        assert not [*runs(one, other, **sizes)]


@settings(deadline=None)
@given(st.data(), geometries(), st.integers(1, 3))
def test_parts_of_any_division_join_to_whatever_is_wanted(
    data: st.DataObject, geometry: CacheGeometry, pages_per_layer: int
) -> None:
    pages, sizes = ModelPages(geometry, 3, pages_per_layer), SIZES | {"pages_per_layer": pages_per_layer}
    split = data.draw(layer_splits(geometry.num_layers))
    tp_size = data.draw(st.sampled_from(TP_SIZES))
    division = Division.for_ranks(geometry, tp_sizes=[tp_size], layer_splits=[split])
    wanted = data.draw(parts_of(geometry))
    pieces = [(one, pages.of(one)) for one in division.loaded_by(Shard(wanted))]
    joined = join_pages(data.draw(st.permutations(pieces)), wanted, **sizes)
    assert bytes(joined) == pages.of(wanted)


@pytest.mark.parametrize("load_tp", TP_SIZES)
@pytest.mark.parametrize("save_tp", TP_SIZES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_ranks_of_any_engine_load_what_ranks_of_any_other_saved(
    num_kv_heads: int, save_tp: int, load_tp: int
) -> None:
    geometry = geometry_of(2, num_kv_heads)
    pages, store = pages_of(geometry), Store()
    division = Division.for_ranks(geometry, tp_sizes=[save_tp, load_tp])
    save(store, geometry, shards_of(geometry, save_tp), division, pages)
    assert len(store.blocks) == NUM_PAGES * len(division.parts)
    shards = shards_of(geometry, load_tp)
    assert load(store, geometry, shards, division) == held(shards, pages)


@pytest.mark.parametrize("load_tp", TP_SIZES)
@pytest.mark.parametrize("save_tp", TP_SIZES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_one_block_a_page_from_who_sees_all_ranks_serves_every_rank(
    num_kv_heads: int, save_tp: int, load_tp: int
) -> None:
    geometry = geometry_of(3, num_kv_heads)
    pages, store = pages_of(geometry), Store()
    sizes = {"section_bytes": layout_of(geometry).section_bytes}
    shards = shards_of(geometry, save_tp, [1, 2])
    with cache_of(store, geometry) as cache:
        for key, page in zip(cache.keys(TOKENS), pages, strict=True):
            pieces = [(shard.part, page.of(shard.part)) for shard in shards if shard.is_saver]
            assert cache.save(key, join_pages(pieces, geometry.whole, **sizes))
    assert store.blocks.keys() == set(cache.keys(TOKENS))
    shards = shards_of(geometry, load_tp, [2, 1])
    assert load(store, geometry, shards, None) == held(shards, pages)


@settings(max_examples=25, deadline=None)
@given(st.data(), geometries())
def test_stages_of_any_engine_load_what_stages_of_any_other_saved(
    data: st.DataObject, geometry: CacheGeometry
) -> None:
    save_split, load_split = (data.draw(layer_splits(geometry.num_layers)) for _ in range(2))
    save_tp, load_tp = (data.draw(st.sampled_from(TP_SIZES[:4])) for _ in range(2))
    pages, store = pages_of(geometry), Store()
    # the loader's heads need no cuts of their own
    division = Division.for_ranks(geometry, tp_sizes=[save_tp], layer_splits=[save_split])
    save(store, geometry, shards_of(geometry, save_tp, save_split), division, pages)
    shards = shards_of(geometry, load_tp, load_split)
    assert load(store, geometry, shards, division) == held(shards, pages)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
def test_blocks_do_not_show_which_engine_made_them(num_kv_heads: int) -> None:
    geometry = geometry_of(6, num_kv_heads)
    pages = pages_of(geometry)
    engines = [(tp_size, split) for tp_size in TP_SIZES for split in ([6], [2, 4], [1, 3, 2])]
    division = Division.for_ranks(geometry, tp_sizes=TP_SIZES, layer_splits=[split for _, split in engines])
    stores = [Store() for _ in engines]
    for store, (tp_size, split) in zip(stores, engines, strict=True):
        save(store, geometry, shards_of(geometry, tp_size, split), division, pages)
    assert all(store.blocks == stores[0].blocks for store in stores)


def test_a_page_without_one_of_its_parts_is_not_there_for_any_rank() -> None:
    geometry = geometry_of(4, 2)
    pages, store = pages_of(geometry), Store()
    division = Division.for_ranks(geometry, tp_sizes=[2], layer_splits=[[1, 3]])
    shards = shards_of(geometry, 2, [1, 3])
    save(store, geometry, shards, division, pages)
    with cache_of(store, geometry, division=division) as cache:
        keys = cache.keys(TOKENS)
    for missing in division.keys(keys[1]):
        block = store.blocks.pop(missing)
        assert load(store, geometry, shards, division) == held(shards, pages[:1])
        store.blocks[missing] = block
    assert load(store, geometry, shards, division) == held(shards, pages)


def test_a_part_that_goes_after_it_was_promised_ends_the_prefix_there() -> None:
    geometry = geometry_of(1, 2)
    pages, store = pages_of(geometry), Store()
    division = Division.for_ranks(geometry, tp_sizes=[2])
    save(store, geometry, shards_of(geometry, 2), division, pages)
    with cache_of(store, geometry, division=division) as cache:
        gone = division.keys(cache.keys(TOKENS)[1])[1]
        loading = cache.load(cache.keys(TOKENS))
        assert bytes(next(loading)) == pages[0].of(geometry.whole)
        del store.blocks[gone]
        assert [*loading] == []
        assert (cache.counters.loaded_pages, cache.counters.failed_pages) == (1, NUM_PAGES - 1)


def test_a_store_that_does_not_answer_has_no_pages(caplog: pytest.LogCaptureFixture) -> None:
    class Down(Store):
        def lookup(self, keys: Sequence[BlockKey]) -> int:
            raise RpcUnavailable("down")

    with cache_of(Down(), geometry_of(1, 1)) as cache:
        assert [cache.lookup(cache.keys(TOKENS)) for _ in range(2)] == [0, 0]
    assert [record.message for record in caplog.records] == [
        "the store does not answer, prefixes are recomputed: down"
    ]


def test_headers_tell_layers_and_heads() -> None:
    geometry = geometry_of(5, 8)
    layout, one = layout_of(geometry), part(1, 3, 6, 2)
    pages = bytes(3 * 2 * layout.section_bytes)
    info = parse_header(pack_pages(layout, 5, KEY, pages, one))
    assert (info.first_layer, info.num_layers) == (1, 3)
    assert (info.first_kv_head, info.num_kv_heads, info.total_kv_heads) == (6, 2, 8)
    assert info.page_bytes == 2 * layout.section_bytes
    assert info.key == part_key(KEY, one, geometry.whole)
    assert block_info(layout, 5, KEY, geometry.whole) == block_info(layout, 5, KEY)


def test_a_block_of_another_part_is_refused() -> None:
    geometry = geometry_of(2, 2)
    layout = layout_of(geometry)
    block = pack_pages(layout, 2, KEY, bytes(2 * layout.section_bytes), part(0, 2, 0, 1))
    assert len(unpack_pages(layout, 2, KEY, block, part(0, 2, 0, 1))) == 2 * layout.section_bytes
    for other in (None, part(0, 2, 1, 1), part(0, 1, 0, 2), part(1, 1, 0, 2)):
        with pytest.raises(IdentityMismatch):
            unpack_pages(layout, 2, KEY, block, other)
    with pytest.raises(ValueError, match="does not lie within"):
        pack_pages(layout, 2, KEY, b"", part(1, 2, 0, 1))


def test_layers_and_whole_pages_are_not_copied() -> None:
    pages = bytes(range(4 * 2 * 3))
    layers = slice_pages(pages, part(0, 4, 0, 2), part(1, 2, 0, 2), **SIZES)
    assert (layers.obj, bytes(layers)) == (pages, pages[6:18])
    assert join_pages([(part(0, 4, 0, 2), pages)], part(1, 2, 0, 2), **SIZES).obj is pages
    assert [*runs(part(0, 4, 0, 2), part(2, 2, 0, 2), **SIZES)] == [(12, 0, 12)]
    assert [*runs(part(0, 2, 0, 2), part(0, 2, 1, 1), **SIZES)] == [(3, 0, 3), (9, 3, 3)]


def test_what_does_not_fit_is_refused() -> None:
    whole, left, right = part(0, 2, 0, 2), part(0, 2, 0, 1), part(0, 2, 1, 1)
    with pytest.raises(ValueError, match="have 12 bytes, not 11"):
        slice_pages(bytes(11), whole, left, **SIZES)
    with pytest.raises(ValueError, match="does not lie within"):
        slice_pages(bytes(6), left, whole, **SIZES)
    with pytest.raises(ValueError, match="does not lie within"):
        join_pages([(left, bytes(6))], whole, **SIZES)
    with pytest.raises(ValueError, match="have 6 bytes, not 7"):
        join_pages([(left, bytes(6)), (right, bytes(7))], whole, **SIZES)
    with pytest.raises(ValueError, match="something in common cannot be joined"):
        join_pages([(left, bytes(6)), (left, bytes(6))], whole, **SIZES)
    with pytest.raises(ValueError, match="do not make up"):
        join_pages([(left, bytes(6)), (part(0, 1, 1, 1), bytes(3))], whole, **SIZES)
    with pytest.raises(ValueError, match="do not make up"):
        join_pages([], whole, **SIZES)
    for sizes in ({"section_bytes": 0}, {"section_bytes": 1, "pages_per_layer": 0}):
        with pytest.raises(ValueError, match="cannot be cut"):
            [*runs(whole, whole, **sizes)]


def test_a_cache_of_another_shape_is_refused() -> None:
    geometry = geometry_of(2, 2)
    divisions = [{"division": Division(*cuts)} for cuts in (((0, 2), (0, 4)), ((0, 1), (0, 2)))]
    for wrong in (*divisions, {"shard": Shard(part(1, 2, 0, 2))}):
        with pytest.raises(ConfigError, match="do not go with"), cache_of(Store(), geometry, **wrong):
            pass


def test_a_finer_division_makes_room_for_larger_pages() -> None:
    geometry = geometry_of(60_000, 32)
    shard, fine = Shard(part(0, 30_000, 0, 8)), Division((0, 30_000, 60_000), (0, 8, 16, 24, 32))
    with pytest.raises(ConfigError, match="a finer division"), cache_of(Store(), geometry, shard):
        pass
    with cache_of(Store(), geometry, shard, fine) as cache:
        assert len(cache.keys(TOKENS)) == NUM_PAGES
