"""Decode attention and speculative verify, ready to be timed."""

import torch

from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.prepared import HALF_ERROR, LSE_ERROR, Errors, Prepared, relative
from benchmarks.gpu.timing import Call
from benchmarks.registry import Case
from tq_kernels import reference_attention
from tq_kernels.decode_attention import decode_attention, decode_workspace

_SEQUENCES_CHECKED = 4


def decode(case: Case, arena: Arena, key_balance: torch.Tensor | None = None) -> Prepared:
    """One query a sequence against scattered pages."""
    layout = case.layout
    pages = arena.pages(layout, arena.num_sets(case) * case.batch * case.pages_per_seq)
    tables = arena.block_tables(case, len(pages))
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=arena.device)
    rows = (case.new_tokens,) if case.new_tokens > 1 else ()
    query = arena.normal(case.batch, *rows, case.q_heads, case.head_dim)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=arena.device)
    workspace = decode_workspace(
        layout, case.batch, case.q_heads, case.pages_per_seq, arena.device, rows=case.new_tokens
    )
    scale = case.head_dim**-0.5

    def call(table: torch.Tensor) -> Call:
        return lambda: decode_attention(
            query,
            pages,
            table,
            lengths,
            layout,
            softmax_scale=scale,
            out=out,
            lse=lse,
            workspace=workspace,
            key_balance=key_balance,
        )

    calls = [call(table) for table in tables]

    def check() -> Errors:
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        calls[0]()
        step = max(1, (case.batch - 1) // (_SEQUENCES_CHECKED - 1))
        some = torch.arange(0, case.batch, step, device=arena.device)[:_SEQUENCES_CHECKED]
        want, want_lse = reference_attention.decode_attention(
            query[some],
            pages,
            tables[0][some],
            lengths[some],
            layout,
            softmax_scale=scale,
            key_balance=key_balance,
        )
        return {
            "output": (relative(out[some], want), HALF_ERROR),
            "log-sum-exp": (float((lse[some] - want_lse).abs().max()), LSE_ERROR),
            "elements never written": (float(out.isnan().sum() + lse.isnan().sum()), 0.0),
        }

    return Prepared(
        calls=calls,
        check=check,
        num_bytes=case.page_bytes + 4 * query.numel(),
        flops=4 * query.numel() * case.context,
    )


def verify(case: Case, arena: Arena) -> Prepared:
    """The newest tokens of every sequence at once, through the decode path."""
    return decode(case, arena)
