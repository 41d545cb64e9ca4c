"""Time decode attention with the channel balance of a codec state against without it, side by side.

``python -m benchmarks.gpu.balance`` prints a table and writes ``benchmarks/results/balance_gpu.jsonl``.
"""

import json
from pathlib import Path

import torch
import triton

from benchmarks.circumstances import circumstances
from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.timing import Call, Stopwatch
from benchmarks.registry import Case
from tq_kernels import reference_attention
from tq_kernels.decode_attention import decode_attention, decode_workspace

RESULTS = Path(__file__).parents[1] / "results" / "balance_gpu.jsonl"
SHAPES = ((8, 8192), (32, 8192), (32, 32768), (1, 131072))
"""Batch and context."""
LARGEST_ERROR = 1e-2


def calls(case: Case, arena: Arena, balance: torch.Tensor | None) -> list[Call]:
    """One call a set of inputs, the first one compared with the reference."""
    pages = arena.pages(case.layout, arena.num_sets(case) * case.batch * case.pages_per_seq)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=arena.device)
    query = arena.normal(case.batch, case.q_heads, case.head_dim)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:-1], device=arena.device)
    workspace = decode_workspace(case.layout, case.batch, case.q_heads, case.pages_per_seq, arena.device)
    tables, scale = arena.block_tables(case, len(pages)), case.head_dim**-0.5

    def call(table: torch.Tensor) -> Call:
        return lambda: decode_attention(
            query,
            pages,
            table,
            lengths,
            case.layout,
            softmax_scale=scale,
            out=out,
            lse=lse,
            workspace=workspace,
            key_balance=balance,
        )

    call(tables[0])()
    want, _ = reference_attention.decode_attention(
        query[:1], pages, tables[0][:1], lengths[:1], case.layout, softmax_scale=scale, key_balance=balance
    )
    error = float((out[:1].float() - want.float()).norm() / want.float().norm())
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{case.name} errs by {error:.2e}: no number of a wrong result")
    return [call(table) for table in tables]


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
                watch.time_graph(calls(case, arena, each)).median_us for each in (None, balance)
            )
            shape = {"op": "decode", "preset": preset, "batch": batch, "context": tokens}
            rows.append({**shape, "median_us": plain, "balanced_us": balanced, **context})
            print(
                f"{preset:8}{f'{batch} x {tokens}':>17}{plain:9.1f}us{balanced:9.1f}us{balanced / plain:8.3f}"
            )
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
