"""Launches that decode and extend attention share: prepare a query, attend over splits, merge."""

import math
from functools import lru_cache

import torch

from tq_kernels._dispatch import has_nvidia_assembly
from tq_kernels._page_shape import page_shape
from tq_kernels.compiled import launch
from tq_kernels.decode_plan import DecodePlan
from tq_kernels.device.decode import attend_split
from tq_kernels.device.merge import merge_splits
from tq_kernels.device.prepare_query import prepare_query
from tq_kernels.layout import PageLayout
from tq_kernels.reference import rotation_of

LOG2_E = math.log2(math.e)

_PREPARED_AT_ONCE = 16
_ROTATION_AT_ONCE = 1 << 12
_PARTIALS_AT_ONCE = 1 << 13
_SINK_PRODUCTS_AT_ONCE = 64


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def whole_rotation(layout: PageLayout, device: torch.device, rotated: bool = True) -> torch.Tensor:
    """head_dim times the rotation, or times the identity: float16 ``[head_dim, head_dim]``, all integers."""
    if not rotated:
        return (layout.head_dim * torch.eye(layout.head_dim)).to(device, torch.float16)
    return (layout.head_dim * rotation_of(layout, device)).round().to(torch.float16)


def score_factor(softmax_scale: float, softcap: float | None) -> float:
    """What a score is multiplied by: it goes on in base 2, or to the argument of tanh."""
    return softmax_scale * LOG2_E if softcap is None else softmax_scale / softcap


def cap_log2(softcap: float | None) -> float:
    """What tanh is multiplied by, in base 2."""
    return (softcap or 0.0) * LOG2_E


def channels_at_once(layout: PageLayout) -> int:
    """Columns of the rotation that a program holds at once."""
    return _ROTATION_AT_ONCE // page_shape(layout).tile_dim


def launch_prepare(
    *,
    query: torch.Tensor,
    key_balance: torch.Tensor | None,
    prepared: torch.Tensor,
    layout: PageLayout,
    factor: float,
    lengths: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Bring queries ``[num_seqs, rows, num_query_heads, head_dim]`` into columns and note their positions."""
    num_seqs, rows, num_query_heads, head_dim = query.shape
    num_kv_heads, padded = prepared.shape[1:3]
    rotated = layout.spec.key.rotated
    channels = channels_at_once(layout) if rotated else page_shape(layout).tile_dim
    tiles = -(-num_seqs * num_kv_heads * padded // _PREPARED_AT_ONCE)
    launch(
        prepare_query,
        (tiles, page_shape(layout).tile_dim // channels),
        p_query=query,
        p_balance=key_balance,
        p_rotation=whole_rotation(layout, query.device) if rotated else None,
        p_lengths=lengths,
        p_given_positions=query_positions,
        p_prepared=prepared,
        p_positions=positions,
        num_seqs=num_seqs,
        num_kv_heads=num_kv_heads,
        num_columns=rows * num_query_heads // num_kv_heads,
        padded_columns=padded,
        factor=factor / head_dim if rotated else factor,
        query_seq_stride=query.stride(0),
        query_row_stride=query.stride(1),
        query_head_stride=query.stride(2),
        GROUP=num_query_heads // num_kv_heads,
        D=head_dim,
        D_TILE=page_shape(layout).tile_dim,
        M=_PREPARED_AT_ONCE,
        N=channels,
        num_warps=4,
    )


def launch_split(
    plan: DecodePlan,
    *,
    prepared: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    layout: PageLayout,
    rows: int,
    num_sinks: int,
    sliding_window: int | None,
    softcap: float | None,
    sink_rows: torch.Tensor | None = None,
) -> None:
    """Attend over every split of every sequence and KV head, by the kernel that the plan names.

    Args:
        plan: How the work is cut.
        prepared: ``[num_seqs or more, num_kv_heads, padded_columns, head_dim]`` float16.
        pages: ``[num_pages, page_bytes]`` uint8.
        block_table: ``[num_seqs, max_pages]`` int32.
        lengths: ``[num_seqs]`` int32.
        positions: ``[num_seqs]`` int32, of the last row.
        partial_out: ``[num_seqs, num_kv_heads, num_splits, columns, head_dim]`` float32, dense; where the
            log-sum-exp is -inf it is not written. Still rotated.
        partial_lse: ``[num_seqs, num_kv_heads, num_splits, columns]`` float32, dense, base 2.
        layout: Page geometry and codec.
        rows: Query rows a sequence.
        num_sinks: Leave out the first so many positions.
        sliding_window: See only the last so many positions up to a row's own, or all.
        softcap: Cap of the scores, or none.
        sink_rows: ``[num_seqs]`` int32; a negative one leaves out none of its sequence's positions.
    """
    _, num_kv_heads, padded, _ = prepared.shape
    if plan.variant == "hopper":
        from tq_kernels import hopper_launch  # Gluon is a part of some Triton releases only

        hopper_launch.launch_split(
            plan,
            query=prepared,
            pages=pages,
            block_table=block_table,
            lengths=lengths,
            positions=positions,
            sink_rows=sink_rows,
            partial_out=partial_out,
            partial_lse=partial_lse,
            layout=layout,
            rows=rows,
            num_sinks=num_sinks,
            sliding_window=sliding_window,
            softcap=softcap,
            cap_log2=cap_log2(softcap),
            early=False,
        )
        return
    ptx = has_nvidia_assembly(pages.device)
    launch(
        attend_split,
        (plan.num_splits, num_kv_heads * (padded // plan.tile_columns), lengths.shape[0]),
        p_query=prepared,
        p_pages=pages,
        p_table=block_table,
        p_lengths=lengths,
        p_positions=positions,
        p_sink_rows=sink_rows,
        p_out=partial_out,
        p_lse=partial_lse,
        table_stride=block_table.stride(0),
        page_stride=pages.stride(0),
        num_kv_heads=num_kv_heads,
        num_columns=plan.columns,
        padded_columns=padded,
        num_splits=plan.num_splits,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        cap_log2=cap_log2(softcap),
        GROUP=plan.columns // rows,
        C=plan.tile_columns,
        N=plan.tile_tokens,
        MANY_ROWS=rows > 1,
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        PTX=ptx,
        SHAPE=page_shape(layout),
        num_warps=plan.num_warps,
        num_stages=1,
        **({"maxnreg": plan.num_registers} if ptx else {}),
    )


def launch_merge(
    *,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PageLayout,
    merge_columns: int,
    rotated: bool,
    base_2: tuple[bool, bool] = (True, False),
    extra_out: torch.Tensor | None = None,
    extra_lse: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink_keys: torch.Tensor | None = None,
    sink_values: torch.Tensor | None = None,
    sink_rows: torch.Tensor | None = None,
    softmax_scale: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Merge splits, a running result and raw sinks, and rotate the output back.

    Args:
        partial_out: ``[num_seqs, num_kv_heads, num_splits, columns, head_dim]``, last dimension dense.
        partial_lse: ``[num_seqs, num_kv_heads, num_splits, columns]`` float32.
        out: ``[num_seqs, rows, num_kv_heads, group, head_dim]``, last dimension dense.
        lse: ``[num_seqs, rows, num_kv_heads, group]`` float32.
        layout: Page geometry and codec.
        merge_columns: Columns of a program.
        rotated: Whether `partial_out` and `extra_out` are to be rotated back.
        base_2: Whether `partial_lse` and `lse` are in base 2; natural if not.
        extra_out: ``[num_seqs, num_kv_heads, columns, head_dim]`` float32, dense: one more part.
        extra_lse: ``[num_seqs, num_kv_heads, columns]`` float32, dense, base 2.
        query: ``[num_seqs, rows, num_query_heads, head_dim]`` as the caller has it; with sinks only.
        positions: ``[num_seqs]`` int32 of the last row; with sinks only.
        sink_keys: ``[num_rows, num_sinks, num_kv_heads, head_dim]``.
        sink_values: The same shape and strides.
        sink_rows: ``[num_seqs]`` int32 row of each sequence; by default its own number.
        softmax_scale: Factor on the scores of sinks.
        sliding_window: See only sinks among the last so many positions up to a row's own, or all.
        softcap: Their cap, or none.
    """
    num_seqs, rows, num_kv_heads, group, head_dim = out.shape
    num_splits = partial_out.shape[2]
    num_sinks = 0 if sink_keys is None else sink_keys.shape[1]
    sinks = 1 << (num_sinks - 1).bit_length() if num_sinks else 0
    columns = min(merge_columns, max(1, _SINK_PRODUCTS_AT_ONCE // sinks)) if sinks else merge_columns
    tile_dim = page_shape(layout).tile_dim
    at_once = max(1, _PARTIALS_AT_ONCE // (columns * tile_dim))
    launch(
        merge_splits,
        (num_seqs * num_kv_heads, -(-rows * group // columns)),
        p_partial=partial_out,
        p_partial_lse=partial_lse,
        p_extra=extra_out,
        p_extra_lse=extra_lse,
        p_query=query,
        p_sink_keys=sink_keys,
        p_sink_values=sink_values,
        p_sink_rows=sink_rows,
        p_positions=positions,
        p_rotation=whole_rotation(layout, out.device, rotated) if rotated or num_sinks else None,
        p_out=out,
        p_lse=lse,
        num_kv_heads=num_kv_heads,
        num_columns=rows * group,
        num_splits=num_splits,
        partial_pair_stride=partial_out.stride(1),
        partial_split_stride=partial_out.stride(2),
        partial_column_stride=partial_out.stride(3),
        partial_lse_pair_stride=partial_lse.stride(1),
        partial_lse_split_stride=partial_lse.stride(2),
        partial_lse_column_stride=partial_lse.stride(3),
        query_seq_stride=0 if query is None else query.stride(0),
        query_row_stride=0 if query is None else query.stride(1),
        query_head_stride=0 if query is None else query.stride(2),
        sink_seq_stride=0 if sink_keys is None else sink_keys.stride(0),
        sink_token_stride=0 if sink_keys is None else sink_keys.stride(1),
        sink_head_stride=0 if sink_keys is None else sink_keys.stride(2),
        out_seq_stride=out.stride(0),
        out_row_stride=out.stride(1),
        out_pair_stride=out.stride(2),
        out_head_stride=out.stride(3),
        lse_seq_stride=lse.stride(0),
        lse_row_stride=lse.stride(1),
        lse_pair_stride=lse.stride(2),
        lse_head_stride=lse.stride(3),
        num_sinks=num_sinks,
        window=sliding_window or 0,
        score_factor=score_factor(softmax_scale, softcap),
        cap_log2=cap_log2(softcap),
        partial_lse_unit=1.0 if base_2[0] else LOG2_E,
        lse_unit=1.0 if base_2[1] else 1 / LOG2_E,
        GROUP=group,
        D=head_dim,
        D_TILE=tile_dim,
        C=columns,
        S=min(at_once, 1 << max(0, num_splits - 1).bit_length()),
        N=channels_at_once(layout),
        SINKS=sinks,
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        num_warps=4,
    )
