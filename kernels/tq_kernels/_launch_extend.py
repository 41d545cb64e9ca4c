"""Launches of extend attention alone: a chunk of queries over pages, and over raw tokens."""

import torch

from tq_kernels._dispatch import has_nvidia_assembly, is_interpreted
from tq_kernels._launch import cap_log2, channels_at_once, score_factor, whole_rotation
from tq_kernels._page_shape import page_shape
from tq_kernels.compiled import launch
from tq_kernels.device.extend import attend_prefix, attend_raw
from tq_kernels.extend_plan import ExtendPlan
from tq_kernels.layout import PageLayout


def launch_prefix(
    plan: ExtendPlan,
    *,
    prepared: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: int,
    first_position: int,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    layout: PageLayout,
    group: int,
    num_sinks: int,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Attend with prepared columns ``[1, num_kv_heads, padded_columns, head_dim]`` over the prefix.

    Leaves what `launch_split` leaves, in the dtype of `partial_out`.
    """
    tiles = -(-plan.columns // plan.tile_columns)
    launch(
        attend_prefix,
        (tiles, layout.num_kv_heads, plan.num_splits),
        p_query=prepared,
        p_pages=pages,
        p_table=block_table,
        p_out=partial_out,
        p_lse=partial_lse,
        prefix_len=prefix_len,
        first_position=first_position,
        num_columns=plan.columns,
        padded_columns=plan.padded_columns,
        page_stride=pages.stride(0),
        num_splits=plan.num_splits,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        cap_log2=cap_log2(softcap),
        GROUP=group,
        M=plan.tile_columns,
        N=plan.tile_tokens,
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        PTX=has_nvidia_assembly(pages.device),
        SHAPE=page_shape(layout),
        num_warps=plan.num_warps,
        num_stages=1,
    )


def launch_raw(
    plan: ExtendPlan,
    *,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix_len: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PageLayout,
    num_sinks: int,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Attend with queries ``[num_new, num_query_heads, head_dim]`` over raw sinks and the raw tail.

    Args:
        plan: How the work is cut.
        query: As the caller has it.
        keys: ``[num_sinks + num_raw, num_kv_heads, head_dim]``, the query's dtype.
        values: The same shape and dtype.
        prefix_len: Position of the first raw token that is no sink.
        out: ``[num_kv_heads, columns, head_dim]``, dense; in the rotated domain of values.
        lse: ``[num_kv_heads, columns]`` float32, dense, base 2.
        layout: Page geometry and codec.
        num_sinks: Tokens of `keys` that stand at positions 0 and on.
        softmax_scale: Factor on the scores.
        sliding_window: See only the last so many positions up to a row's own, or all.
        softcap: Cap of the scores, or none.
    """
    num_new, num_query_heads, head_dim = query.shape
    launch(
        attend_raw,
        (-(-plan.columns // plan.raw_columns), layout.num_kv_heads),
        p_query=query,
        p_keys=keys,
        p_values=values,
        p_rotation=whole_rotation(layout, query.device) if layout.spec.value.rotated else None,
        p_out=out,
        p_lse=lse,
        prefix_len=prefix_len,
        first_position=prefix_len + keys.shape[0] - num_sinks - num_new,
        num_tokens=keys.shape[0],
        num_columns=plan.columns,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        score_factor=score_factor(softmax_scale, softcap),
        cap_log2=cap_log2(softcap),
        query_row_stride=query.stride(0),
        query_head_stride=query.stride(1),
        key_token_stride=keys.stride(0),
        key_head_stride=keys.stride(1),
        value_token_stride=values.stride(0),
        value_head_stride=values.stride(1),
        GROUP=num_query_heads // layout.num_kv_heads,
        D=head_dim,
        D_TILE=page_shape(layout).tile_dim,
        M=plan.raw_columns,
        N=plan.raw_tokens,
        BLOCK=channels_at_once(layout),
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        # the interpreter's products do not know bfloat16
        AS_FLOAT=query.dtype is torch.float32 or is_interpreted(),
        num_warps=plan.raw_warps,
        num_stages=2,
    )
