"""compile_kernels: layers' kernels run once on pages of nobody, so that no request waits for a compiler."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import SMALLEST_CHUNK, DenseAttention, Inflater
from tq_connectors.engine.short_chunks import LONGEST_CHUNK, ROWS, Chunk, short_chunks
from tq_connectors.engine.sink_pool import NUM_SINKS, SinkPool
from tq_kernels.compiled import compile_ahead
from tq_kernels.extend_attention import ExtendWorkspace
from tq_kernels.layout import PageLayout
from tq_kernels.step import prepare_step

logger = logging.getLogger(__name__)
_Given = ParamSpec("_Given")

_WRITTEN_TOKENS = (640, 16)
"""A launch of many tokens and one of few, which are different kernels."""
_PREFIX_PAGES = (1, 2, 4, 8, 16, 32, 64)
"""Each doubles the parts that a prefix is attended to in, and so is merged by another kernel."""
_MANY_CHUNKS = (14, 48, 136)
"""Chunks that nearly fill a device, so that a short prefix is cut in two, or fill it, so that none is.

The last of them fill it with one KV head as well: so programs with all registers are tried (`few_serve`).
"""


def _told(launch: Callable[_Given, None]) -> Callable[_Given, None]:
    """Say how long it took, or why it failed, which is no failure of the engine's."""

    @wraps(launch)
    def told(*arguments: _Given.args, **named: _Given.kwargs) -> None:
        started = time.monotonic()
        try:
            launch(*arguments, **named)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception:
            logger.warning("tq-store: kernels could not be compiled before the first request", exc_info=True)
        else:
            logger.info("tq-store: kernels are compiled, in %.1f s", time.monotonic() - started)

    return told


@_told
def compile_kernels(
    layers: Iterable[tuple[PagedAttention, DenseAttention | None]],
    *,
    num_query_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    inflater: Inflater | None,
    workspace: ExtendWorkspace | None,
) -> None:
    """Launch nearly all that steps launch; not decodes of drafts, nor merges of every size of a long chunk.

    All is compiled at once, then launched. What fails here is said and left to the request that needs it. The
    engine's random numbers stay as they are.

    Args:
        layers: Layers of one layout, each with its attention for the inflater, if the engine has that; one of
            every window and cap is tried. Their sinks are neither read nor written.
        num_query_heads: Query heads of this process.
        dtype: Of the model.
        device: Where the pages are.
        inflater: The engine's, if it has one.
        workspace: The engine's for `PagedAttention.extend`.
    """
    kinds = {(attention.sliding_window, attention.softcap): (attention, dense) for attention, dense in layers}

    def launch() -> None:
        for attention, dense in kinds.values():
            _launch(attention, num_query_heads, dtype, device, inflater, dense, workspace)

    try:
        compile_ahead(launch)
    except Exception:  # of a Triton that knows no such thing; launching compiles one kernel after the other
        logger.info("tq-store: kernels are not compiled side by side", exc_info=True)
    launch()


def _launch(
    attention: PagedAttention,
    num_query_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    inflater: Inflater | None,
    dense: DenseAttention | None,
    workspace: ExtendWorkspace | None,
) -> None:
    """All kernels of a layer."""
    layout = attention.layout
    page_tokens = layout.page_tokens
    num_tokens = max(_WRITTEN_TOKENS)
    pages = torch.zeros(-(-num_tokens // page_tokens), layout.page_bytes, dtype=torch.uint8, device=device)
    numbers = torch.Generator(device)
    keys, values, query = (
        torch.randn(num_tokens, heads, layout.head_dim, dtype=dtype, device=device, generator=numbers)
        for heads in (layout.num_kv_heads, layout.num_kv_heads, num_query_heads)
    )
    out, slots = torch.empty_like(query), torch.arange(num_tokens, device=device)
    nowhere = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
    has_sinks = attention.sink_keys is not None
    for count, one_per_page in (*((count, False) for count in _WRITTEN_TOKENS), (1, True)):
        attention.write(
            keys[:count],
            values[:count],
            slots[:count],
            pages,
            seed_pages=nowhere[:count],
            sink_slots=nowhere[:count] if has_sinks else None,
            one_per_page=one_per_page,
        )
    table = torch.arange(max(_PREFIX_PAGES) + 1, dtype=torch.int32, device=device) % len(pages)
    if has_sinks:
        _prepare_steps(table, pages, layout, dtype)
    for num_new in ROWS:
        for prefix_pages, count in (
            *((each, 1) for each in _PREFIX_PAGES),
            *((1, each) for each in _MANY_CHUNKS),
        ):
            chunk = Chunk(seq=0, first_token=0, num_new=num_new, prefix_len=prefix_pages * page_tokens)
            together = short_chunks(
                [chunk] * count, table[None], nowhere[:1], layout, num_query_heads=num_query_heads
            )
            assert together is not None  # the chunk is short
            together.attend(attention, query, pages, out)
    sink_row = nowhere[:1] if has_sinks else None
    for num_new in (LONGEST_CHUNK + 1, SMALLEST_CHUNK - 1, SMALLEST_CHUNK):
        new = (query[:num_new], keys[:num_new], values[:num_new])
        for prefix_pages in _PREFIX_PAGES if dense else (0, *_PREFIX_PAGES):
            cached = (pages, table, prefix_pages * page_tokens)
            if inflater and dense and inflater.serves(attention, num_new, prefix_pages * page_tokens):
                inflater.attend(attention, dense, *new, *cached, sink_row=sink_row, out=out[:num_new])
            else:
                attention.extend(*new, *cached, sink_row=sink_row, workspace=workspace, out=out[:num_new])


def _prepare_steps(table: torch.Tensor, pages: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> None:
    """What comes before a step: one in which a sequence begins, and one in which none does."""
    rows = SinkPool(layout, num_layers=1, num_rows=1, dtype=dtype, device=pages.device).bind(len(pages))
    one, nothing = (torch.full((1,), number, dtype=torch.int32, device=pages.device) for number in (1, -1))
    for opens in (True, False):
        prepare_step(
            table[None],
            one,
            torch.cat((one - 1, one)),
            layout,
            seed_pages=nothing.clone(),
            sinks=rows,
            pages=pages,
            sink_slots=nothing.clone(),
            sink_rows=nothing.clone(),
            num_sinks=NUM_SINKS,
            clock=1,
            opens=opens,
        )
