"""Checks of what decode and extend attention assume about their arguments."""

import torch

from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import page_shape
from tq_kernels.decode_plan import MAX_GROUP, MAX_ROWS
from tq_kernels.layout import PageLayout

MAX_SINKS = 64


def check_decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageLayout,
    rows: int,
    query_positions: torch.Tensor | None,
) -> None:
    """Tensors of a decode; `decode_attention` describes them.

    Raises:
        ValueError: One that does not fit; the message names it.
    """
    page_shape(layout)
    check_pages(pages, layout)
    shape, device = query.shape, pages.device
    check_tensor("query", query, (*(None,) * (len(shape) - 1), layout.head_dim), FLOATS, device)
    check_group(shape[-2], layout)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"a sequence has 1 to {MAX_ROWS} query rows, not {rows}")
    num_seqs = shape[0]
    check_tensor("block_table", block_table, (num_seqs, None), (torch.int32,), device)
    check_tensor("lengths", lengths, (num_seqs,), (torch.int32,), device)
    if query_positions is not None:
        check_tensor("query_positions", query_positions, (num_seqs,), (torch.int32,), device)


def check_group(num_query_heads: int, layout: PageLayout) -> None:
    """Query heads are shared out evenly among KV heads, at most 16 each.

    Raises:
        ValueError: They are not.
    """
    group, rest = divmod(num_query_heads, layout.num_kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise ValueError(
            f"query heads must be 1 to {MAX_GROUP} times the {layout.num_kv_heads} KV heads, "
            f"not {num_query_heads}"
        )


def check_mask(
    layout: PageLayout,
    device: torch.device,
    sliding_window: int | None,
    softcap: float | None,
    num_sinks: int,
    key_balance: torch.Tensor | None,
) -> None:
    """Options that decode and extend share.

    Raises:
        ValueError: One that means nothing.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if num_sinks < 0:
        raise ValueError(f"num_sinks must not be negative, not {num_sinks}")
    if key_balance is not None:
        shape = (layout.num_kv_heads, layout.head_dim)
        check_tensor("key_balance", key_balance, shape, (torch.float32,), device, contiguous_dims=2)


def check_sinks(
    query: torch.Tensor,
    layout: PageLayout,
    num_sinks: int,
    sink_keys: torch.Tensor | None,
    sink_values: torch.Tensor | None,
    sink_rows: torch.Tensor | None,
) -> None:
    """Raw sinks of a decode: both sides or neither, and as many as are left out of the pages.

    Raises:
        ValueError: Anything else.
    """
    if (sink_keys is None) != (sink_values is None):
        raise ValueError("sink_keys and sink_values come together")
    if sink_keys is None or sink_values is None:
        if sink_rows is not None:
            raise ValueError("sink_rows needs sink_keys and sink_values")
        return
    if num_sinks > MAX_SINKS:
        raise ValueError(f"at most {MAX_SINKS} sinks are merged, not {num_sinks}")
    num_rows = query.shape[0] if sink_rows is None else None
    shape = (num_rows, num_sinks, layout.num_kv_heads, layout.head_dim)
    halves = (torch.bfloat16, torch.float16)
    check_tensor("sink_keys", sink_keys, shape, halves, query.device)
    check_tensor("sink_values", sink_values, sink_keys.shape, (sink_keys.dtype,), query.device)
    if sink_rows is not None:
        check_tensor("sink_rows", sink_rows, (query.shape[0],), (torch.int32,), query.device)
    if sink_keys.stride() != sink_values.stride():
        raise ValueError(
            f"sink_keys and sink_values must have equal strides, not {sink_keys.stride()} and "
            f"{sink_values.stride()}"
        )
