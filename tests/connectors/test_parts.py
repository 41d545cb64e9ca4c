"""Who saves and loads what: ranks, divisions and the keys of parts."""

import pytest
from connectors.ranks import geometries, geometry_of, layer_splits, stages
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_connectors.codec import CacheGeometry
from tq_connectors.parts import Division, Shard, shard_of
from tq_store.errors import ConfigError
from tq_store.keys import BlockKey, Part

KEY = BlockKey(bytes(range(64)))


def cells(part: Part) -> set[tuple[int, int]]:
    """Every layer and head of a part."""
    return {
        (layer, head)
        for layer in range(part.first_layer, part.last_layer + 1)
        for head in range(part.first_kv_head, part.last_kv_head + 1)
    }


def heads_of(tp_size: int, num_kv_heads: int) -> list[tuple[list[int], bool]]:
    """Heads of each rank, and whether it saves."""
    shards = [
        shard_of(geometry_of(1, num_kv_heads), tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)
    ]
    return [(sorted(head for _, head in cells(shard.part)), shard.is_saver) for shard in shards]


def test_ranks_hold_equal_runs_of_heads_and_the_first_of_equals_saves() -> None:
    assert heads_of(2, 8) == [([0, 1, 2, 3], True), ([4, 5, 6, 7], True)]
    assert heads_of(4, 2) == [([0], True), ([0], False), ([1], True), ([1], False)]
    assert heads_of(3, 1) == [([0], True), ([0], False), ([0], False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_rank": 2, "tp_size": 2}, "no rank 2 of 2"),
        ({"tp_rank": -1, "tp_size": 2}, "no rank -1 of 2"),
        ({"tp_size": 0}, "no rank 0 of 0"),
        ({"tp_size": 3}, "8 KV heads cannot be spread evenly over 3 ranks"),
        ({"tp_size": 12}, "8 KV heads cannot be spread evenly over 12 ranks"),
        ({"layers": range(4, 4)}, "not consecutive layers"),
        ({"layers": range(-1, 4)}, "not consecutive layers"),
        ({"layers": range(2, 7)}, "not consecutive layers of the model's 6"),
        ({"layers": range(0, 6, 2)}, "not consecutive layers"),
    ],
)
def test_a_rank_that_no_engine_has_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shard_of(geometry_of(6, 8), **changes)


@pytest.mark.parametrize("cuts", [(), (0,), (1, 2), (0, 2, 2), (0, 3, 2), (0, 0)])
def test_cuts_ascend_from_0(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="division of layers ascends from 0"):
        Division(cuts, (0, 1))
    with pytest.raises(ConfigError, match="division of KV heads ascends from 0"):
        Division((0, 1), cuts)


@pytest.mark.parametrize("split", [[], [0, 6], [5], [3, 4], [7, -1]])
def test_stages_make_up_all_layers(split: list[int]) -> None:
    with pytest.raises(ConfigError, match="do not make up 6"):
        Division.for_ranks(geometry_of(6, 8), tp_sizes=[1], layer_splits=[split])


@settings(deadline=None)
@given(st.data(), geometries())
def test_parts_of_a_division_are_the_whole_once(data: st.DataObject, geometry: CacheGeometry) -> None:
    splits = data.draw(st.lists(layer_splits(geometry.num_layers), max_size=3))
    division = Division.for_ranks(geometry, tp_sizes=[1, geometry.num_kv_heads], layer_splits=splits)
    covered = [cell for part in division.parts for cell in cells(part)]
    assert len(covered) == len(set(covered))
    assert set(covered) == cells(division.whole) == cells(geometry.whole)
    assert len(set(division.keys(KEY))) == len(division.parts)
    assert division.parts == tuple(sorted(division.parts, key=lambda part: min(cells(part))))


@settings(deadline=None)
@given(st.data(), geometries())
def test_ranks_of_an_engine_that_the_division_is_for_save_every_part_once(
    data: st.DataObject, geometry: CacheGeometry
) -> None:
    tp_size, split = (
        data.draw(st.sampled_from([1, 2, 4, 8, 16])),
        data.draw(layer_splits(geometry.num_layers)),
    )
    division = Division.for_ranks(geometry, tp_sizes=[4, tp_size], layer_splits=[split])
    saved: list[Part] = []
    for layers in stages(split):
        for rank in range(tp_size):
            shard = shard_of(geometry, tp_rank=rank, tp_size=tp_size, layers=layers)
            assert set(division.saved_by(shard)) <= set(division.loaded_by(shard))
            loaded = {cell for part in division.loaded_by(shard) for cell in cells(part)}
            assert loaded == cells(shard.part)
            saved += division.saved_by(shard)
    assert sorted(saved, key=division.parts.index) == list(division.parts)


def test_a_rank_that_cuts_through_parts_loads_and_saves_nothing() -> None:
    geometry = geometry_of(6, 8)
    division = Division.for_ranks(geometry, tp_sizes=[2], layer_splits=[[3, 3]])
    shard = shard_of(geometry, tp_rank=1, tp_size=4, layers=range(2, 6))
    assert division.saved_by(shard) == []
    assert division.loaded_by(shard) == [division.parts[0], division.parts[2]]
    assert Division.undivided(geometry).saved_by(Shard(geometry.whole)) == [geometry.whole]


def test_the_block_of_everything_bears_the_key_of_its_page() -> None:
    geometry = geometry_of(6, 8)
    assert Division.undivided(geometry).keys(KEY) == [KEY]
    divided = Division.for_ranks(geometry, tp_sizes=[2])
    assert KEY not in divided.keys(KEY)
    assert {key[:32] for key in divided.keys(KEY)} == {KEY[:32]}
    with pytest.raises(ValueError, match="does not lie within"):
        divided.key(KEY, geometry_of(7, 8).whole)
