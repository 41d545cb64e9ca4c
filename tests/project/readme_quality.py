"""The README's tables of quality, made from `benchmarks/results/quality.jsonl`.

`python -m tests.project.readme_quality` rewrites it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality.groups import family, main_groups
from benchmarks.quality.rows import Row, read_rows

README = Path(__file__).parents[2] / "README.md"
_BEGIN = "<!-- quality: rewritten by `python -m tests.project.readme_quality` -->\n"
_END = "<!-- end of quality -->\n"
_NOT_YET = "Not measured yet: `make bench-quality` does it.\n"
_LEFT_OUT = ("none", "bf16", "kivi4-g32", "kivi2-g32")
_BESIDE = ("bf16", "fp8", "tq4", "tq3", "vllm-4bit_nc")
"""Methods of the tables of RULER and of the store, in their order."""


def table(rows: Sequence[Row]) -> str:
    """Markdown: the plot, a line for each method that was measured, the circumstances, and smaller tables."""
    groups = {
        model: {row["preset"]: row for row in group if row.get("kl_mean") is not None}
        for model, group in main_groups(rows, "text").items()
    }
    groups = {model: by_preset for model, by_preset in groups.items() if by_preset}
    if not groups:
        return _NOT_YET
    presets = dict.fromkeys(preset for by_preset in groups.values() for preset in by_preset)
    header = "| method |" + "".join(f" {model}: over bf16 | KL | top-1 | perplexity |" for model in groups)
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    lines += [_line(preset, groups) for preset in presets if preset not in _LEFT_OUT]
    plot = "![logit KL against size](benchmarks/results/quality.svg)\n"
    return "\n".join([plot, *lines, "", _circumstances(groups), *_retrieval(rows), *_through_store(rows)])


def _retrieval(rows: Sequence[Row]) -> list[str]:
    """Lines of RULER's scores: a line for each model and length, the tasks one after the other."""
    rows = [row for row in rows if "ruler" in row]
    if not rows:
        return []
    cells = {
        (row["model"], row["tokens"], row["preset"]): " / ".join(
            f"{score:.0f}" for score in row["ruler"].values()
        )
        for row in rows
    }
    runs = sorted({(row["model"], row["tokens"], row["samples"]) for row in rows}, key=_largest_last)
    return [
        f"RULER: {', '.join(f'`{task}`' for task in rows[0]['ruler'])}, each in percent.",
        "",
        f"| tokens (samples) | {' | '.join(map(_name, _BESIDE))} |",
        "|---" * (len(_BESIDE) + 1) + "|",
        *(
            f"| {model}, {tokens:,} ({samples}) | "
            + " | ".join(cells.get((model, tokens, preset), "") for preset in _BESIDE)
            + " |"
            for model, tokens, samples in runs
        ),
        "",
    ]


def _largest_last(run: tuple[str, int, int]) -> tuple[bool, str, int]:
    model, tokens, _ = run
    return not model.startswith("smollm"), model, tokens


def _through_store(rows: Sequence[Row]) -> list[str]:
    """Lines of what blocks lose that were saved, fetched and attended on, by model."""
    groups = {
        model: {row["preset"]: row["kl_mean"] for row in group}
        for model, group in main_groups(rows, "store").items()
    }
    if not groups:
        return []
    presets = dict.fromkeys(preset for by_preset in groups.values() for preset in by_preset)
    return [
        "KL of blocks that were saved to a server, fetched and attended on, as a replica does it:",
        "",
        f"| | {' | '.join(map(_name, presets))} |",
        "|---" * (len(presets) + 1) + "|",
        *(
            f"| {model} | "
            + " | ".join(f"{by_preset[preset]:.4f}" if preset in by_preset else "" for preset in presets)
            + " |"
            for model, by_preset in groups.items()
        ),
        "",
    ]


def _name(preset: str) -> str:
    return f"`{preset}`" if family(preset) in ("ours", "stateless", "cold") else preset


def _line(preset: str, groups: Mapping[str, Mapping[str, Row]]) -> str:
    cells = [_name(preset)]
    for by_preset in groups.values():
        if row := by_preset.get(preset):
            ratio = row["bytes_per_token_bf16"] / row["bytes_per_token"]
            cells += [f"{ratio:.2f}x", f"{row['kl_mean']:.4f}", f"{row['top1']:.1%}"]
            cells += [f"{row['ppl_ratio'] - 1:+.1%}"]
        else:
            cells += [""] * 4
    return f"| {' | '.join(cells)} |"


def _circumstances(groups: Mapping[str, Mapping[str, Row]]) -> str:
    rows = [row for by_preset in groups.values() for row in by_preset.values()]
    texts = ", ".join(sorted({f"{row['texts']} x {row['tokens']} tokens" for row in rows}))
    made = "; ".join(
        sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}" for row in rows})
    )
    return (
        f"First articles of a Wikipedia extract, {texts}; every token read compressed at every layer and "
        f"position, {rows[0]['sinks']} raw sink tokens for all, no raw tail. Sizes count everything. "
        "vLLM's presets are emulated: `vllm-*` keeps its first and last two layers in bf16 as stock does, "
        "`-all` does not. Weights are dequantised 4-bit ones. All metrics, per layer and per input, are in "
        f"[quality.html](benchmarks/results/quality.html). {made}.\n"
    )


def parts() -> tuple[str, str, str]:
    """README before, within and after the table."""
    head, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    within, _, tail = rest.partition(_END)
    return head, within, tail


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(f"{before}{_BEGIN}{table(read_rows())}{_END}{after}", encoding="utf-8")
