"""Names of tables by layer: one for equal tables, and nothing else is read."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tq_store.errors import ConfigError
from tq_store.layer_table import MOST_CHARACTERS, LayerTable

PRESETS = ("tq4", "tq3", "k8v4", "raw")


def named(rest: str, by_layer: list[str], data: st.DataObject) -> str:
    """One of the many names of a table: layers in any order and in runs cut anywhere."""
    groups: dict[str, list[str]] = {}
    for preset, group in itertools.groupby(enumerate(by_layer), key=lambda each: each[1]):
        layers = [layer for layer, _ in group]
        if preset != rest:
            cut = data.draw(st.integers(1, len(layers)))
            for run in filter(None, (layers[:cut], layers[cut:])):
                text = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
                groups.setdefault(preset, []).append(text)
    others = [f"{preset}:{','.join(data.draw(st.permutations(runs)))}" for preset, runs in groups.items()]
    return "+".join([rest, *data.draw(st.permutations(others))])


@given(st.data(), st.sampled_from(PRESETS), st.lists(st.sampled_from(PRESETS), min_size=1, max_size=24))
def test_every_table_has_names_and_one_of_them_is_its_own(
    data: st.DataObject, rest: str, by_layer: list[str]
) -> None:
    name = named(rest, by_layer, data)
    table = LayerTable.parse(name)
    assert list(table.by_layer(len(by_layer))) == by_layer
    assert set(table.presets) == {rest, *by_layer}
    assert LayerTable.parse(str(table)) == table
    other = LayerTable.parse(named(rest, by_layer, data))
    assert (other, str(other), hash(other)) == (table, str(table), hash(table))
    longer = table.by_layer(len(by_layer) + 5)
    assert longer == (*by_layer, *[rest] * 5)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tq4", "tq4"),
        ("tq3+tq4:29,0-1", "tq3+tq4:0-1,29"),
        ("tq3+tq4:0,1,2-3,5", "tq3+tq4:0-3,5"),
        ("tq3+raw:7+tq4:0-1,6", "tq3+tq4:0-1,6+raw:7"),
    ],
)
def test_a_table_says_its_own_name(name: str, own: str) -> None:
    assert str(LayerTable.parse(name)) == own


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "'' names no codec: write a preset, or presets by layer as in"),
        ("tq3+", "names no codec"),
        ("tq3+tq4", "names no codec"),
        ("tq3+tq4:", "names no codec"),
        ("tq3:0+tq4:1", "names no codec"),
        ("tq3+tq4:0;1", "names no codec"),
        ("tq3 + tq4:0", "names no codec"),
        ("tq3+tq4:0\n", "names no codec"),
        ("tq3+tq4:00", "names no codec"),
        ("tq3+tq4:-1", "names no codec"),
        ("tq3+tq4:0-01", "names no codec"),
        ("tq3+tq4:100000", "names no codec"),
        ("tq3+tq4:\u0663", "names no codec"),
        ("TQ3+tq4:0", "names no codec"),
        ("tq3+tq4:5-5", "layers 5-5 in .* do not ascend"),
        ("tq3+tq4:5-3", "layers 5-3 in .* do not ascend"),
        ("tq3+tq4:0-4,3", "has layer 3 twice"),
        ("tq3+tq4:0-4+raw:4-9", "has layer 4 twice"),
        ("tq3+tq3:0", "names tq3 more than once; list all its layers together"),
        ("tq3+tq4:0+tq4:2", "names tq4 more than once"),
        ("tq3+tq4:" + "1," * 130 + "1", "has at most 256 characters, not 269"),
    ],
)
def test_what_is_no_table_is_told(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LayerTable.parse(name)


def test_a_table_is_bounded_however_it_is_cut() -> None:
    name = "tq3+tq4:" + ",".join(str(layer) for layer in range(1, 300, 2))
    longest = name[: MOST_CHARACTERS + 1].rpartition(",")[0]
    assert len(LayerTable.parse(longest).others) < 90


def test_a_layer_that_the_model_lacks_is_told() -> None:
    table = LayerTable.parse("tq3+tq4:0-1,29")
    assert table.by_layer(30)[29] == "tq4"
    with pytest.raises(ConfigError, match=r"tq3\+tq4:0-1,29 names layer 29, and the model has 29 layers"):
        table.by_layer(29)
