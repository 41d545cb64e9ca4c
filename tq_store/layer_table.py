"""Presets by layer in one word: ``tq3+tq4:0-1,29`` is tq3, but tq4 in layers 0, 1 and 29."""

import re
from dataclasses import dataclass

from tq_store.errors import ConfigError

MOST_CHARACTERS = 256
"""Longest name of a table; so a table names at most some eighty runs of layers."""
_PRESET = "[a-z][a-z0-9]*"
_LAYERS = "(?:0|[1-9][0-9]{0,4})(?:-[1-9][0-9]{0,4})?"
_TABLE = re.compile(rf"{_PRESET}(?:\+{_PRESET}:{_LAYERS}(?:,{_LAYERS})*)*")


@dataclass(frozen=True, slots=True)
class LayerTable:
    """A preset for all layers, and others for some; a preset's name alone is the table without others.

    Tables are equal when the same preset is for the rest and the same others are for the same layers. `str`
    gives the one name that equal tables have: layers ascend, others come in the order of their first layers.

    Args:
        rest: Preset of the layers that no other is for.
        others: First layer, last layer and preset of each run of others; ascending, and no two runs of one
            preset touch.
    """

    rest: str
    others: tuple[tuple[int, int, str], ...] = ()

    @classmethod
    def parse(cls, name: str) -> "LayerTable":
        """Table from ``PRESET+PRESET:LAYERS+...``, with layers as ``0-1,29``, counted from 0.

        Whether there are such presets is for the caller to see.

        Raises:
            ConfigError: Not a name of that form, or two presets for one layer.
        """
        if len(name) > MOST_CHARACTERS:
            raise ConfigError(f"a codec's name has at most {MOST_CHARACTERS} characters, not {len(name)}")
        if not _TABLE.fullmatch(name):
            raise ConfigError(
                f"{name!r} names no codec: write a preset, or presets by layer as in tq3+tq4:0-1,29"
            )
        rest, *groups = name.split("+")
        named = [rest, *(group.partition(":")[0] for group in groups)]
        for preset in named:
            if named.count(preset) > 1:
                raise ConfigError(f"{name!r} names {preset} more than once; list all its layers together")
        runs = sorted(run for group in groups for run in _runs(group, name))
        others: list[tuple[int, int, str]] = []
        for first, last, preset in runs:
            if others and first <= others[-1][1]:
                raise ConfigError(f"{name!r} has layer {first} twice")
            if others and (first, preset) == (others[-1][1] + 1, others[-1][2]):
                first = others.pop()[0]
            others.append((first, last, preset))
        return cls(rest, tuple(others))

    @property
    def presets(self) -> tuple[str, ...]:
        """Every preset that it names, each once."""
        return tuple(dict.fromkeys((self.rest, *(preset for _, _, preset in self.others))))

    def by_layer(self, num_layers: int) -> tuple[str, ...]:
        """Preset of each of a model's layers.

        Raises:
            ConfigError: It names a layer that the model does not have.
        """
        if self.others and self.others[-1][1] >= num_layers:
            raise ConfigError(
                f"{self} names layer {self.others[-1][1]}, and the model has {num_layers} layers from 0 on"
            )
        by_layer = [self.rest] * num_layers
        for first, last, preset in self.others:
            by_layer[first : last + 1] = [preset] * (last + 1 - first)
        return tuple(by_layer)

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for first, last, preset in self.others:
            groups.setdefault(preset, []).append(f"{first}" if first == last else f"{first}-{last}")
        return "+".join([self.rest, *(f"{preset}:{','.join(runs)}" for preset, runs in groups.items())])


def _runs(group: str, name: str) -> list[tuple[int, int, str]]:
    """First layer, last layer and preset of each run in ``PRESET:LAYERS``."""
    preset, _, layers = group.partition(":")
    runs = []
    for text in layers.split(","):
        first, _, last = text.partition("-")
        if last and int(first) >= int(last):
            raise ConfigError(f"layers {text} in {name!r} do not ascend")
        runs.append((int(first), int(last or first), preset))
    return runs
