"""Plots of measured rows as SVG: what is lost against what is kept."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.quality.groups import FAMILIES, bits_per_value, family
from benchmarks.quality.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REFERENCES = ("none", "bf16")
_PALETTE = ("#c1272d", "#f08030", "#a3123f", "#1f77b4", "#7fb2d9", "#2a9d4a", "#8e6bbf", "#555555")
_COLOURS = dict(zip(FAMILIES, _PALETTE, strict=True))


def loss_against_size(groups: Mapping[str, Sequence[Row]], key: str, label: str) -> str:
    """SVG with a panel for each model: a logarithmic loss over bits per value, a colour for each family.

    Models without such a loss have no panel; without any model there is no picture, an empty string.
    """
    groups = {
        model: rows
        for model, rows in groups.items()
        if any(row.get(key) and row["preset"] not in _REFERENCES for row in rows)
    }
    if not groups:
        return ""
    figure, panels = _panels(len(groups))
    for axes, (model, rows) in zip(panels, groups.items(), strict=True):
        for name in FAMILIES:
            points = sorted(
                (bits_per_value(row), row[key], row["preset"])
                for row in rows
                if family(row["preset"]) == name and row.get(key) and row["preset"] not in _REFERENCES
            )
            if points:
                sizes, losses, _ = zip(*points, strict=True)
                style = "o" if name in ("cast", "vllm") else "o-"
                axes.plot(sizes, losses, style, color=_COLOURS[name], markersize=4, linewidth=1, label=name)
                for size, loss, preset in points:
                    _name_point(axes, size, loss, preset)
        axes.set_yscale("log")
        axes.set_title(model, fontsize="medium")
        axes.set_xlabel("bits per value, everything counted (bf16: 16)")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(label)
    panels[0].legend(frameon=False, fontsize="small")
    return _svg(figure)


def correlation_by_layer(groups: Mapping[str, Sequence[Row]], presets: Sequence[str]) -> str:
    """SVG with a panel for each model: what correlations with true scores lack to 1, in every layer.

    Empty where nothing was measured, as above.
    """
    groups = {
        model: [row for row in rows if row["preset"] in presets and row.get("layer_corr")]
        for model, rows in groups.items()
    }
    groups = {model: rows for model, rows in groups.items() if rows}
    if not groups:
        return ""
    figure, panels = _panels(len(groups))
    for axes, (model, rows) in zip(panels, groups.items(), strict=True):
        for row in rows:
            missing = [1 - correlation for correlation in row["layer_corr"]]
            axes.plot(missing, marker=".", linewidth=1, label=row["preset"])
        axes.set_yscale("log")
        axes.set_title(model, fontsize="medium")
        axes.set_xlabel("layer")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="x-small")
    panels[0].set_ylabel("1 - correlation of attention scores")
    return _svg(figure)


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tq-store", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 4.6), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _name_point(axes: "Axes", size: float, loss: float, preset: str) -> None:
    text = preset.removeprefix("vllm-").removesuffix("-all").removesuffix("-stateless").removesuffix("-cold")
    axes.annotate(text, (size, loss), textcoords="offset points", xytext=(4, 3), fontsize=6, color="0.35")


def _svg(figure: "Figure") -> str:
    from matplotlib import pyplot

    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return file.getvalue()
