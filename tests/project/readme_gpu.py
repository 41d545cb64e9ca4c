"""The README's tables of GPU times, made from `benchmarks/results/gpu.jsonl`.

`python -m tests.project.readme_gpu` rewrites them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.registry import BF16, PEERS
from benchmarks.rows import Row, read_rows
from tq_kernels import PRESETS

README = Path(__file__).parents[2] / "README.md"
_BEGIN = "<!-- gpu: rewritten by `python -m tests.project.readme_gpu` -->\n"
_END = "<!-- end of gpu -->\n"
_NOT_YET = "Not measured yet: `make bench-gpu` does it on a machine with an NVIDIA GPU.\n"
_SHAPES = ((32, 32768), (64, 8192), (32, 8192), (8, 8192), (1, 131072))
_PRESET_SHAPES = ((32, 8192), (32, 32768))
_OPS = ("quantize", "append", "dequantize", "extend")
_PEER_SHAPES = ((32, 8192), (1, 131072))
_HEAD_DIM, _PAGE_TOKENS = 128, 128
"""Of rows that say neither."""


def tables(rows: Sequence[Row]) -> str:
    """Markdown: tq4 at every shape, every preset, the other ops, the peers, and the circumstances."""
    if not rows:
        return _NOT_YET
    plot = "![speed-up over bf16 against context](benchmarks/results/decode_speedup.svg)\n"
    parts = [plot, _shapes(rows), _presets(rows), _others(rows), _peers(rows), _circumstances(rows)]
    return "\n".join(part for part in parts if part)


def parts() -> tuple[str, str, str]:
    """README before, within and after the tables."""
    head, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    within, _, tail = rest.partition(_END)
    return head, within, tail


def _shapes(rows: Sequence[Row]) -> str:
    body = []
    for batch, context in _SHAPES:
        for row in _decode(rows, "tq4", batch, context, BF16):
            limit = next(_decode(rows, "tq4", batch, context, ("fp8-limit",)), None)
            body.append(
                f"| {batch} x {context:,} | {row['median_us']:,.1f} us | {row['gbps']:,.0f} "
                f"({row['roofline']:.0%} of a copy) | {_us(row)} ({row['baseline'].removesuffix('-bf16')}) "
                f"| **{_times(row)}** | {_times(limit)} |"
            )
    return _table(
        "| decode `tq4`, batch x context | time | GB/s | bf16 | over bf16 | over FP8's limit |", body
    )


def _presets(rows: Sequence[Row]) -> str:
    body = []
    for preset in PRESETS:
        cells = []
        for batch, context in _PRESET_SHAPES:
            row = next(_decode(rows, preset, batch, context, BF16), None)
            limit = next(_decode(rows, preset, batch, context, ("fp8-limit",)), None)
            time = f"{row['median_us']:,.1f} us, {row['gbps']:,.0f} GB/s" if row else ""
            cells += [time, _times(row), _times(limit)]
        if any(cells):
            body.append(f"| `{preset}` | {' | '.join(cells)} |")
    columns = " | ".join(
        f"{batch} x {context:,} | over bf16 | over FP8's limit" for batch, context in _PRESET_SHAPES
    )
    return _table(f"| decode, preset | {columns} |", body)


def _others(rows: Sequence[Row]) -> str:
    body = []
    for op in _OPS:
        for row in rows:
            if row["op"] == op and row["preset"] == "tq4" and row["baseline"] not in PEERS:
                size = f"{row['batch']} x {row['context']:,}"
                if op == "extend":
                    size = f"{row['new_tokens']} over {row['context']:,}"
                elif op == "append":
                    size = f"{row['batch']} x 1"
                if row["head_dim"] != _HEAD_DIM:
                    size += f", d = {row['head_dim']}"
                if row.get("page_tokens", _PAGE_TOKENS) != _PAGE_TOKENS:
                    size += f", {row['page_tokens']}-token pages"
                body.append(
                    f"| {op} | {size} | {row['median_us']:,.1f} us | {row['roofline']:.0%} "
                    f"| {row['baseline']}: {_us(row)} | {_times(row)} |"
                )
    return _table("| `tq4` | tokens | time | of roofline | against | over it |", body)


def _peers(rows: Sequence[Row]) -> str:
    body = []
    for peer in PEERS:
        cells = []
        for batch, context in _PEER_SHAPES:
            row = next(_decode(rows, "tq4", batch, context, (peer,)), None)
            cells += [_us(row), _times(row)]
        encode = next((row for row in rows if row["op"] == "quantize" and row["baseline"] == peer), None)
        cells += [_us(encode), _times(encode)]
        if any(cells):
            body.append(f"| {peer} | {' | '.join(cells)} |")
    columns = " | ".join(f"decode {batch} x {context:,} | `tq4` over it" for batch, context in _PEER_SHAPES)
    return _table(f"| other kernels, 4 bits | {columns} | quantize 32k | `tq4` over it |", body)


def _circumstances(rows: Sequence[Row]) -> str:
    facts = {(row["device"], row["torch"], row["triton"], row["commit"]) for row in rows}
    machines = "; ".join(
        f"{device}, torch {torch}, Triton {triton}, commit {commit}"
        for device, torch, triton, commit in sorted(facts)
    )
    return (
        "32 query over 8 KV heads, d = 128, 128-token pages. Medians of graph replays with a cold L2; bf16 "
        "is the faster of cuDNN's and torch's FlashAttention; FP8's limit is half of bf16's bytes at the "
        f"bandwidth of a copy. {machines}.\n"
    )


def _decode(
    rows: Iterable[Row], preset: str, batch: int, context: int, baselines: tuple[str, ...]
) -> Iterator[Row]:
    wanted = {"op": "decode", "preset": preset, "batch": batch, "context": context, "page_tokens": 128}
    wanted |= {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
    return (
        row
        for row in rows
        if row["baseline"] in baselines and all(row.get(key) == value for key, value in wanted.items())
    )


def _us(row: Row | None) -> str:
    """Time of the baseline."""
    return "" if row is None else f"{row['baseline_us']:,.1f} us" if row["baseline_us"] else "no time"


def _times(row: Row | None) -> str:
    return "" if row is None or row["speedup"] is None else f"{row['speedup']:.2f}x"


def _table(header: str, body: Sequence[str]) -> str:
    if not body:
        return ""
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *body]) + "\n"


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(f"{before}{_BEGIN}{tables(read_rows())}{_END}{after}", encoding="utf-8")
