"""Extend attention, ready to be timed."""

import torch

from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.prepared import HALF_ERROR, LSE_ERROR, Errors, Prepared, relative
from benchmarks.registry import Case
from tq_kernels import reference_attention
from tq_kernels.extend_attention import extend_attention, extend_workspace
from tq_kernels.extend_plan import WORKSPACE_TOKENS

_QUERIES_CHECKED = 16


def extend(case: Case, arena: Arena) -> Prepared:
    """New queries of one sequence against its compressed prefix and themselves."""
    layout = case.layout
    pages = arena.pages(layout, case.pages_per_seq)
    table = arena.block_tables(case, len(pages))[0][0]
    query = arena.normal(case.new_tokens, case.q_heads, case.head_dim)
    keys, values = arena.normal(2, case.new_tokens, case.kv_heads, case.head_dim)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=arena.device)
    workspace = extend_workspace(layout, min(case.context, WORKSPACE_TOKENS), arena.device)
    scale = case.head_dim**-0.5

    def call() -> object:
        return extend_attention(
            query,
            keys,
            values,
            pages,
            table,
            case.context,
            layout,
            softmax_scale=scale,
            out=out,
            lse=lse,
            workspace=workspace,
        )

    def check() -> Errors:
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        call()
        want, want_lse = reference_attention.extend_attention(
            query[-_QUERIES_CHECKED:], keys, values, pages, table, case.context, layout, softmax_scale=scale
        )
        first, _ = reference_attention.extend_attention(
            query[:1], keys[:1], values[:1], pages, table, case.context, layout, softmax_scale=scale
        )
        return {
            "last rows": (relative(out[-_QUERIES_CHECKED:], want), HALF_ERROR),
            "first row": (relative(out[:1], first), HALF_ERROR),
            "log-sum-exp": (float((lse[-_QUERIES_CHECKED:] - want_lse).abs().max()), LSE_ERROR),
            "elements never written": (float(out.isnan().sum() + lse.isnan().sum()), 0.0),
        }

    pairs = case.new_tokens * case.context + case.new_tokens * (case.new_tokens + 1) // 2
    rows = 4 * case.new_tokens * (case.q_heads + case.kv_heads) * case.head_dim
    return Prepared(
        calls=[call],
        check=check,
        num_bytes=case.page_bytes + rows,
        flops=4 * pairs * case.q_heads * case.head_dim,
    )
