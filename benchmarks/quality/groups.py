"""Rows that may be held against each other: same model, same text, same conditions."""

from collections.abc import Iterable
from typing import Any

from benchmarks.quality.rows import IDENTITY, Row

_CONDITIONS = tuple(key for key in IDENTITY if key not in ("measure", "preset"))
_DEFAULTS = {"sinks": 4, "tail": 0}

FAMILIES = {
    "ours": "this project's pages",
    "stateless": "this project's pages without a codec state",
    "cold": "the same bytes in the form for storage: trellis levels and an entropy code",
    "vllm": "vLLM's presets as they are: first and last two layers in bf16",
    "vllm-all": "vLLM's presets on every layer",
    "kivi": "KIVI",
    "paper": "the TurboQuant paper's channel split",
    "cast": "plain casts",
}
"""Kinds of methods, and what they are."""


def family(preset: str) -> str:
    """Which kind of method a preset is."""
    if preset.startswith("vllm-"):
        return "vllm-all" if preset.endswith("-all") else "vllm"
    if preset in ("none", "bf16", "fp8"):
        return "cast"
    for name in ("stateless", "cold"):
        if preset.endswith(f"-{name}"):
            return name
    return next((name for name in ("kivi", "paper") if preset.startswith(name)), "ours")


def grouped(rows: Iterable[Row], measure: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one measure by model and conditions, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["measure"] == measure:
            groups.setdefault(tuple(row.get(key) for key in _CONDITIONS), []).append(row)
    return groups


def main_groups(rows: Iterable[Row], measure: str) -> dict[str, list[Row]]:
    """For each model the rows under default sinks and tail over the most text."""
    best: dict[str, list[Row]] = {}
    for group in grouped(rows, measure).values():
        model = group[0]["model"]
        if all(group[0][key] == value for key, value in _DEFAULTS.items()) and (
            model not in best or _size(group) > _size(best[model])
        ):
            best[model] = group
    return best


def _size(group: list[Row]) -> tuple[int, int]:
    """Tokens scored, then methods measured."""
    return group[0]["tokens"] * (group[0].get("texts") or 1), len(group)


def bits_per_value(row: Row) -> float:
    """Size of a row: bits that a number of the cache takes, everything counted; bf16 has 16."""
    return float(16 * row["bytes_per_token"] / row["bytes_per_token_bf16"])
