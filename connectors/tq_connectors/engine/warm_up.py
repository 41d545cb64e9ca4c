"""compile_kernels: a layer's kernels run once on pages of nobody, so that no request waits for a compiler."""

import logging
import time

import torch

from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import SMALLEST_CHUNK, DenseAttention, Inflater
from tq_connectors.engine.short_chunks import LONGEST_CHUNK, ROWS, Chunk, short_chunks
from tq_kernels.extend_attention import ExtendWorkspace

logger = logging.getLogger(__name__)

_WRITTEN_TOKENS = (640, 16)
"""A launch of many tokens and one of few, which are different kernels."""
_LONG_TOKENS = 8192
"""A prefix that is attended to in several parts."""


def compile_kernels(
    attention: PagedAttention,
    *,
    num_query_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    inflater: Inflater | None,
    dense: DenseAttention | None,
    workspace: ExtendWorkspace | None,
) -> None:
    """Launch what steps other than decodes launch; engines capture decodes before they serve, too.

    What fails here is said and left to the request that needs it.

    Args:
        attention: A layer; its sinks are neither read nor written.
        num_query_heads: Query heads of this process.
        dtype: Of the model.
        device: Where the pages are.
        inflater: The engine's, if it has one; comes with `dense`.
        dense: Its attention for the inflater.
        workspace: The engine's for `PagedAttention.extend`.
    """
    started = time.monotonic()
    try:
        _launch_all(attention, num_query_heads, dtype, device, inflater, dense, workspace)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        logger.warning("tq-store: kernels could not be compiled before the first request", exc_info=True)
        return
    logger.info("tq-store: kernels are compiled, in %.1f s", time.monotonic() - started)


def _launch_all(
    attention: PagedAttention,
    num_query_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    inflater: Inflater | None,
    dense: DenseAttention | None,
    workspace: ExtendWorkspace | None,
) -> None:
    layout = attention.layout
    page_tokens = layout.page_tokens
    num_tokens = max(_WRITTEN_TOKENS)
    pages = torch.zeros(-(-num_tokens // page_tokens), layout.page_bytes, dtype=torch.uint8, device=device)
    shape = (num_tokens, layout.num_kv_heads, layout.head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(num_tokens, num_query_heads, layout.head_dim, dtype=dtype, device=device)
    out, slots = torch.empty_like(query), torch.arange(num_tokens, device=device)
    nowhere = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
    has_sinks = attention.sink_keys is not None
    for count in _WRITTEN_TOKENS:
        attention.write(
            keys[:count],
            values[:count],
            slots[:count],
            pages,
            seed_pages=nowhere[:count],
            sink_slots=nowhere[:count] if has_sinks else None,
        )
    table = torch.arange(_LONG_TOKENS // page_tokens + 2, dtype=torch.int32, device=device) % len(pages)
    for num_new in ROWS:
        for prefix_len in (page_tokens, _LONG_TOKENS):
            chunk = Chunk(seq=0, first_token=0, num_new=num_new, prefix_len=prefix_len)
            together = short_chunks(
                [chunk], table[None], nowhere[:1], layout, num_query_heads=num_query_heads
            )
            assert together is not None  # the chunk is short
            together.attend(attention, query, pages, out)
    for num_new in (LONGEST_CHUNK + 1, SMALLEST_CHUNK):
        new = (query[:num_new], keys[:num_new], values[:num_new])
        cached = (pages, table, page_tokens)
        sink_row = nowhere[:1] if has_sinks else None
        if inflater and dense and inflater.serves(attention, num_new, page_tokens):
            inflater.attend(attention, dense, *new, *cached, sink_row=sink_row, out=out[:num_new])
        else:
            attention.extend(*new, *cached, sink_row=sink_row, workspace=workspace, out=out[:num_new])
