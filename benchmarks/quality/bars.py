"""What the presets are to reach on two known models, and whether measured rows reach it."""

from collections.abc import Iterator, Sequence

from benchmarks.quality.groups import main_groups
from benchmarks.quality.rows import Row

_PRESETS = ("tq4", "k4v3", "tq3", "k3v2", "k3v2+k3v4:0-1", "tq3-cold")
LARGEST_KL = {
    "smollm2-135m-instruct": dict(zip(_PRESETS, (0.014, 0.028, 0.053, 0.12, 0.12, 0.03), strict=True)),
    "qwen2.5-coder-0.5b-instruct": dict(
        zip(_PRESETS, (0.013, 0.02, 0.045, 0.085, 0.085, 0.025), strict=True)
    ),
}
"""Mean logit KL in nats, at most, by model and preset."""

SMALLEST_CORRELATION = {"tq4": 0.99, "tq3": 0.98}
"""Correlation of attention scores in the worst layer, at least, on every model."""

LARGEST_RULER_LOSS, LEAST_RULER_BASE = 1.0, 60.0
"""Points of RULER that tq4 may lose to bf16, wherever bf16 scores more than the base."""


def judged(rows: Sequence[Row]) -> Iterator[str]:
    """A line for every bar about which the rows say something."""
    for model, group in main_groups(rows, "text").items():
        for row in group:
            preset = row["preset"]
            bars = (
                ("kl_mean", LARGEST_KL.get(model, {}).get(preset), "at most", 1),
                ("worst_layer_corr", SMALLEST_CORRELATION.get(preset), "at least", -1),
            )
            for key, bound, word, sign in bars:
                if bound is not None and row.get(key) is not None:
                    verdict = "met" if sign * row[key] <= sign * bound else "MISSED"
                    yield f"{verdict:7}{model} {row['preset']}: {key} {row[key]:.4f}, {word} {bound}"
    yield from _ruler(rows)


def _ruler(rows: Sequence[Row]) -> Iterator[str]:
    scores = {
        (row["model"], row["tokens"], row["preset"], task): score
        for row in rows
        if row["measure"] == "retrieval"
        for task, score in row["ruler"].items()
    }
    for (model, num_tokens, preset, task), score in scores.items():
        base = scores.get((model, num_tokens, "bf16", task), 0)
        if preset == "tq4" and base > LEAST_RULER_BASE:
            verdict = "met" if score >= base - LARGEST_RULER_LOSS else "MISSED"
            yield f"{verdict:7}{model} {preset}: {task} at {num_tokens} {score:.1f}, bf16 {base:.1f}"
