"""Quantize, whole chunks and single tokens, ready to be timed."""

import torch

from benchmarks.gpu.inputs import Arena, slots_of
from benchmarks.gpu.prepared import Errors, Prepared, relative
from benchmarks.gpu.timing import Call
from benchmarks.registry import Case
from tq_kernels import PageLayout, reference
from tq_kernels._page_shape import page_shape
from tq_kernels.quantize import quantize_slots
from tq_kernels.quantize_plan import plan_quantize

_POISON = 0xA5
_APPEND_LAYERS = 32
_APPEND_OFFSET = 77

_BYTES_ERROR = 1e-2
"""Relative difference of what pages of two writers stand for: indices may differ next to a boundary."""

_APPEND_ERROR = 1.5
"""Root of distortion of appended tokens over that of the same tokens quantized as whole pages."""


def quantize(case: Case, arena: Arena) -> Prepared:
    """Whole pages from raw tokens, scattered."""
    layout, num_tokens = case.layout, case.batch * case.context
    num_sets = arena.num_sets(case)
    inputs = [arena.normal(2, num_tokens, case.kv_heads, case.head_dim) for _ in range(num_sets)]
    outputs = [_poisoned(layout, num_tokens // case.page_tokens, arena) for _ in range(num_sets)]
    order = torch.randperm(len(outputs[0]), generator=arena.generator, device=arena.device)
    slots = slots_of(order, layout)

    def call(tokens: torch.Tensor, pages: torch.Tensor) -> Call:
        return lambda: quantize_slots(tokens[0], tokens[1], slots, pages, layout)

    calls = [call(tokens, pages) for tokens, pages in zip(inputs, outputs, strict=True)]

    def check() -> Errors:
        outputs[0].fill_(_POISON)
        calls[0]()
        keys, values = inputs[0]
        got = reference.dequantize(outputs[0][order], layout)
        search = plan_quantize(num_tokens, page_shape(layout)).search
        want = reference.dequantize(reference.quantize(keys, values, layout, search=search), layout)
        return {
            side: (relative(ours, theirs), _BYTES_ERROR)
            for side, ours, theirs in zip(("keys", "values"), got, want, strict=True)
        }

    return Prepared(calls=calls, check=check, num_bytes=case.bf16_bytes + case.page_bytes + 8 * num_tokens)


def append(case: Case, arena: Arena) -> Prepared:
    """One token of every sequence into a page that holds some already, for each of many layers."""
    layout = case.layout
    tokens = arena.normal(2, case.batch * case.page_tokens, case.kv_heads, case.head_dim)
    whole = reference.quantize(tokens[0], tokens[1], layout)
    layers = [whole.clone() for _ in range(_APPEND_LAYERS)]
    slots = torch.arange(case.batch, device=arena.device) * case.page_tokens + _APPEND_OFFSET
    new = tokens[:, slots].contiguous()

    def call(pages: torch.Tensor) -> Call:
        return lambda: quantize_slots(new[0], new[1], slots, pages, layout, one_per_page=True)

    calls = [call(pages) for pages in layers]

    def check() -> Errors:
        layers[0].copy_(whole)
        calls[0]()
        errors = {}
        before, after = (reference.dequantize(pages, layout) for pages in (whole, layers[0]))
        others = torch.ones(len(tokens[0]), dtype=torch.bool, device=arena.device)
        others[slots] = False
        for side, raw, old, got in zip(("key", "value"), tokens, before, after, strict=True):
            ratio = relative(got[slots], raw[slots]) / relative(old[slots], raw[slots])
            errors[f"{side} distortion over that of whole pages"] = (ratio, _APPEND_ERROR)
            errors[f"{side}s of tokens not written"] = (relative(got[others], old[others]), 0.0)
        return errors

    per_token = 4 * case.kv_heads * case.head_dim + case.kv_heads * layout.slot_bytes
    return Prepared(calls=calls, check=check, num_bytes=case.batch * per_token)


def _poisoned(layout: PageLayout, num_pages: int, arena: Arena) -> torch.Tensor:
    pages = torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8, device=arena.device)
    return pages.fill_(_POISON)
