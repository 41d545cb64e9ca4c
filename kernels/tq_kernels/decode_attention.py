"""Decode attention over packed pages, as `reference_attention.decode_attention` has it, in three launches.

Queries are balanced, rotated, scaled and brought into columns, one for each query row and query head of a KV
head; a split of a sequence attends with all columns of a KV head at once, so that they share one read of its
pages; splits and raw sinks are merged and the output is rotated back, once.
"""

from dataclasses import dataclass

import torch

from tq_kernels import hopper, reference_attention
from tq_kernels._attention_guards import check_decode, check_mask, check_sinks
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import FLOATS, check_tensor
from tq_kernels.decode_plan import DecodePlan, machine_of, plan_decode
from tq_kernels.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkspace:
    """What a decode writes on its way; it may serve any number of decodes that do not overlap.

    Args:
        layout: Of the pages that it is for.
        plan: How the work is cut.
        prepared: ``[num_seqs, num_kv_heads, padded_columns, head_dim]`` float16.
        positions: ``[num_seqs]`` int32.
        partial_out: ``[num_seqs, num_kv_heads, num_splits, columns, head_dim]`` float32.
        partial_lse: ``[num_seqs, num_kv_heads, num_splits, columns]`` float32.
    """

    layout: PageLayout
    plan: DecodePlan
    prepared: torch.Tensor
    positions: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor


def decode_workspace(
    layout: PageLayout,
    num_seqs: int,
    num_query_heads: int,
    max_pages: int,
    device: torch.device,
    rows: int = 1,
    plan: DecodePlan | None = None,
) -> DecodeWorkspace:
    """A workspace for up to num_seqs sequences of about max_pages pages; longer ones are right, but slower.

    Args:
        layout: Page geometry and codec.
        num_seqs: Most sequences of a decode.
        num_query_heads: Query heads.
        max_pages: Pages of the longest sequence to be fast for.
        device: Where the pages are.
        rows: Query rows a sequence.
        plan: Another plan than `plan_decode` makes.
    """
    if plan is None:
        plan = plan_decode(
            layout,
            machine_of(device),
            num_seqs=num_seqs,
            num_query_heads=num_query_heads,
            max_pages=max_pages,
            rows=rows,
        )
    heads, head_dim = layout.num_kv_heads, layout.head_dim
    partial = (num_seqs, heads, plan.num_splits, plan.columns)
    return DecodeWorkspace(
        layout=layout,
        plan=plan,
        prepared=torch.empty(
            (num_seqs, heads, plan.padded_columns, head_dim), dtype=torch.float16, device=device
        ),
        positions=torch.empty(num_seqs, dtype=torch.int32, device=device),
        partial_out=torch.empty((*partial, head_dim), dtype=torch.float32, device=device),
        partial_lse=torch.empty(partial, dtype=torch.float32, device=device),
    )


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageLayout,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    query_positions: torch.Tensor | None = None,
    num_sinks: int = 0,
    sink_keys: torch.Tensor | None = None,
    sink_values: torch.Tensor | None = None,
    sink_rows: torch.Tensor | None = None,
    key_balance: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest queries of every sequence against the tokens in its pages.

    Never waits for the device, and launches grids fixed by shapes. With `out`, `lse` and `workspace` nothing
    is allocated either, so that a CUDA graph may hold it; call it once before capture, as kernels are
    compiled and constants made on first use. Tokens in pages stand at positions 0 and on; row r of a sequence
    stands at ``query_positions - (rows - 1) + r`` and sees no later token: drafts are verified in one go.

    Args:
        query: ``[num_seqs, num_query_heads, head_dim]``, or ``[num_seqs, rows, num_query_heads, head_dim]``
            with up to 16 rows; bf16, fp16 or float32, last dimension contiguous; up to 16 query heads for
            each KV head.
        pages: ``[num_pages, page_bytes]`` uint8.
        block_table: ``[num_seqs, max_pages]`` int32 page of every run of page_tokens tokens; anything past
            the end of a sequence.
        lengths: ``[num_seqs]`` int32 tokens to attend to; 0 gives zeros and a log-sum-exp of -inf. The rest
            of the last page may never have been written.
        layout: Page geometry and codec; page_tokens a power of two up to 128, head_dim up to 256.
        softmax_scale: Factor on the scores.
        sliding_window: Attend only to the last so many positions up to a row's own, or to all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``, or stay as they are.
        query_positions: ``[num_seqs]`` int32 position of the last row; by default ``lengths - 1``.
        num_sinks: Leave out the first so many positions of the pages.
        sink_keys: ``[num_seqs, num_sinks, num_kv_heads, head_dim]`` bf16 or fp16: raw keys of these
            positions, up to 64, attended to in place of what pages hold, where the window reaches.
        sink_values: The same shape, dtype and strides; both or neither.
        sink_rows: ``[num_seqs]`` int32: the first dimension of both is then any number of rows, and this is
            the row of each sequence, or negative for one that has no raw sinks and reads those of its pages.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys were divided when pages were made.
        out: Written and returned: the query's shape, any of its dtypes, last dimension contiguous.
        lse: Written and returned: float32 of that shape without its last dimension.
        workspace: From `decode_workspace` for this layout, these heads and rows, and no fewer sequences.

    Returns:
        Output in the query's dtype, and the natural log-sum-exp of the scores, sinks included, in float32.

    Raises:
        ValueError: A shape, dtype, device or stride that the kernels do not serve; the message names it.
    """
    shape = query.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"query must have 3 or 4 dimensions, not {list(shape)}")
    has_rows = len(shape) == 4
    rows = shape[1] if has_rows else 1
    check_decode(query, pages, block_table, lengths, layout, rows, query_positions)
    check_mask(layout, query.device, sliding_window, softcap, num_sinks, key_balance)
    check_sinks(query, layout, num_sinks, sink_keys, sink_values, sink_rows)
    if out is None:
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
    check_tensor("out", out, shape, FLOATS, pages.device)
    if lse is None:
        lse = torch.empty(shape[:-1], dtype=torch.float32, device=query.device)
    check_tensor("lse", lse, shape[:-1], (torch.float32,), pages.device, contiguous_dims=0)
    if workspace is not None:
        _check_workspace(workspace, query, layout, rows)
    if not shape[0]:
        return out, lse
    if not takes_kernel(query.device):
        results = reference_attention.decode_attention(
            query,
            pages,
            block_table,
            lengths,
            layout,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
            query_positions=query_positions,
            num_sinks=num_sinks,
            sink_keys=sink_keys,
            sink_values=sink_values,
            sink_rows=sink_rows,
            key_balance=key_balance,
        )
        return out.copy_(results[0]), lse.copy_(results[1])
    if workspace is None:
        num_seqs, max_pages = block_table.shape
        workspace = decode_workspace(layout, num_seqs, query.shape[-2], max_pages, query.device, rows)
    _launch(
        query if has_rows else query[:, None],
        pages,
        block_table,
        lengths,
        layout,
        workspace=workspace,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        query_positions=query_positions,
        num_sinks=num_sinks,
        sink_keys=sink_keys,
        sink_values=sink_values,
        sink_rows=sink_rows,
        key_balance=key_balance,
        out=out if has_rows else out[:, None],
        lse=lse if has_rows else lse[:, None],
    )
    return out, lse


def _launch(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageLayout,
    *,
    workspace: DecodeWorkspace,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    query_positions: torch.Tensor | None,
    num_sinks: int,
    sink_keys: torch.Tensor | None,
    sink_values: torch.Tensor | None,
    sink_rows: torch.Tensor | None,
    key_balance: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    from tq_kernels import _launch as plain  # Triton is there on some platforms only

    rows = query.shape[1]
    # of more sequences than there may be here, of which launches leave the rest alone
    prepared, partial_out, partial_lse = workspace.prepared, workspace.partial_out, workspace.partial_lse
    factor = plain.score_factor(softmax_scale, softcap)
    if workspace.plan.variant == "hopper":
        from tq_kernels import hopper_launch  # Gluon is a part of some Triton releases only

        raw = hopper.rotates_queries(layout, workspace.plan.padded_columns)
        if not raw:
            hopper_launch.launch_prepare(
                query=query, key_balance=key_balance, prepared=prepared, layout=layout, factor=factor
            )
        hopper_launch.launch_split(
            workspace.plan,
            query=query if raw else prepared,
            pages=pages,
            block_table=block_table,
            lengths=lengths,
            positions=query_positions,
            sink_rows=sink_rows,
            partial_out=partial_out,
            partial_lse=partial_lse,
            layout=layout,
            rows=rows,
            num_sinks=num_sinks,
            sliding_window=sliding_window,
            softcap=softcap,
            cap_log2=plain.cap_log2(softcap),
            early=True,
            raw=raw,
            key_balance=key_balance if raw else None,
            factor=factor if raw else 1.0,
        )
        hopper_launch.launch_merge(
            partial_out=partial_out,
            partial_lse=partial_lse,
            query=query,
            lengths=lengths,
            positions=query_positions,
            out=out,
            lse=lse,
            layout=layout,
            sink_keys=sink_keys,
            sink_values=sink_values,
            sink_rows=sink_rows,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        return
    plain.launch_prepare(
        query=query,
        lengths=lengths,
        query_positions=query_positions,
        key_balance=key_balance,
        prepared=prepared,
        positions=workspace.positions,
        layout=layout,
        factor=factor,
    )
    plain.launch_split(
        workspace.plan,
        prepared=prepared,
        pages=pages,
        block_table=block_table,
        lengths=lengths,
        positions=workspace.positions,
        partial_out=partial_out,
        partial_lse=partial_lse,
        layout=layout,
        rows=rows,
        num_sinks=num_sinks,
        sliding_window=sliding_window,
        softcap=softcap,
        sink_rows=sink_rows,
    )
    plain.launch_merge(
        partial_out=partial_out,
        partial_lse=partial_lse,
        out=out.unflatten(2, (layout.num_kv_heads, -1)),
        lse=lse.unflatten(2, (layout.num_kv_heads, -1)),
        layout=layout,
        merge_columns=workspace.plan.merge_columns,
        rotated=layout.spec.value.rotated,
        query=query,
        positions=workspace.positions,
        sink_keys=sink_keys,
        sink_values=sink_values,
        sink_rows=sink_rows,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )


def _check_workspace(workspace: DecodeWorkspace, query: torch.Tensor, layout: PageLayout, rows: int) -> None:
    num_seqs, columns = query.shape[0], rows * query.shape[-2] // layout.num_kv_heads
    seqs, device = workspace.partial_out.shape[0], workspace.partial_out.device
    if (workspace.layout, workspace.plan.columns) != (layout, columns) or seqs < num_seqs:
        raise ValueError(
            f"the workspace is for {seqs} sequences of {workspace.plan.columns} columns over "
            f"{workspace.layout}; needed are {num_seqs} of {columns} over {layout}"
        )
    if device != query.device:
        raise ValueError(f"the workspace is for {device}, the query is on {query.device}")
