"""Time decode attention with the channel balance of a codec state against without it, side by side.

``python -m benchmarks.gpu.balance`` prints a table and writes ``benchmarks/results/balance_gpu.jsonl``.
"""

import json
from pathlib import Path

import torch
import triton

from benchmarks.circumstances import circumstances
from benchmarks.gpu.decode import decode
from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.prepared import failures
from benchmarks.gpu.timing import Call, Stopwatch
from benchmarks.registry import Case

RESULTS = Path(__file__).parents[1] / "results" / "balance_gpu.jsonl"
SHAPES = ((8, 8192), (32, 8192), (32, 32768), (1, 131072))
"""Batch and context."""


def checked_calls(case: Case, arena: Arena, balance: torch.Tensor | None) -> list[Call]:
    """The calls of a case, after its check."""
    prepared = decode(case, arena, balance)
    if wrong := failures(prepared.check()):
        raise SystemExit(f"{case.name}: no number of a wrong result: {', '.join(wrong)}")
    return prepared.calls


def main() -> None:
    """Measure, print, write."""
    device = torch.device("cuda")
    watch = Stopwatch(device)
    arena = Arena(device, watch.l2_bytes)
    context = {
        **circumstances(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows = []
    print(f"{'preset':8}{'batch x context':>17}{'without':>11}{'with':>11}{'ratio':>8}")
    for batch, tokens in SHAPES:
        for preset in ("tq4", "tq3"):
            case = Case(
                op="decode",
                preset=preset,
                batch=batch,
                context=tokens,
                q_heads=32,
                kv_heads=8,
                head_dim=128,
                against=(),
            )
            balance = torch.rand(8, 128, generator=arena.generator, device=device) + 0.5
            plain, balanced = (
                watch.time_graph(checked_calls(case, arena, each)).median_us for each in (None, balance)
            )
            shape = {"op": "decode", "preset": preset, "batch": batch, "context": tokens}
            rows.append({**shape, "median_us": plain, "balanced_us": balanced, **context})
            print(
                f"{preset:8}{f'{batch} x {tokens}':>17}{plain:9.1f}us{balanced:9.1f}us{balanced / plain:8.3f}"
            )
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
