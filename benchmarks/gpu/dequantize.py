"""Dequantize, ready to be timed."""

import torch

from benchmarks.gpu.inputs import Arena, slots_of
from benchmarks.gpu.prepared import HALF_ERROR, Errors, Prepared, relative
from benchmarks.gpu.timing import Call
from benchmarks.registry import Case
from tq_kernels import reference
from tq_kernels.dequantize import dequantize_pages

_ENGINE_PAGE_TOKENS = 16


def dequantize(case: Case, arena: Arena) -> Prepared:
    """Raw tokens from scattered pages, to scattered slots."""
    layout, num_tokens = case.layout, case.batch * case.context
    num_sets, num_pages = arena.num_sets(case), case.batch * case.pages_per_seq
    pages = arena.pages(layout, num_sets * num_pages)
    tables = [table.flatten() for table in arena.block_tables(case, len(pages))]
    order = torch.randperm(num_pages, generator=arena.generator, device=arena.device)
    slots = slots_of(order, layout)
    shape = (2, num_tokens // _ENGINE_PAGE_TOKENS, _ENGINE_PAGE_TOKENS, case.kv_heads, case.head_dim)
    caches = [torch.empty(shape, dtype=torch.bfloat16, device=arena.device) for _ in range(num_sets)]

    def call(table: torch.Tensor, cache: torch.Tensor) -> Call:
        return lambda: dequantize_pages(pages, table, cache[0], cache[1], slots, layout)

    calls = [call(table, cache) for table, cache in zip(tables, caches, strict=True)]

    def check() -> Errors:
        caches[0].fill_(torch.nan)
        calls[0]()
        want = reference.dequantize(pages[tables[0]], layout)
        return {
            side: (relative(cache.flatten(0, 1)[slots], wanted), HALF_ERROR)
            for side, cache, wanted in zip(("keys", "values"), caches[0], want, strict=True)
        }

    return Prepared(calls=calls, check=check, num_bytes=case.bf16_bytes + case.page_bytes + 8 * num_tokens)
