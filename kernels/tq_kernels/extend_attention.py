"""Extend attention: a chunk of new queries over a compressed prefix and over raw tokens.

The truth is `reference_attention.extend_attention`. `extend_plan` says how the prefix is read; whoever reads
it, partial results stay in the rotated domain and are merged with that of the raw tokens, and the output is
rotated back once.
"""

from dataclasses import dataclass

import torch

from tq_kernels import reference_attention
from tq_kernels._attention_guards import check_group, check_mask
from tq_kernels._dispatch import takes_kernel
from tq_kernels._guards import FLOATS, check_pages, check_tensor
from tq_kernels._page_shape import page_shape
from tq_kernels.decode_plan import machine_of
from tq_kernels.extend_plan import WORKSPACE_TOKENS, ExtendPlan, plan_extend
from tq_kernels.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendWorkspace:
    """Room for one run of an inflated prefix, in the rotated domain; it may serve all layers in turn.

    Args:
        keys: ``[1, tokens, num_kv_heads, head_dim]`` float16.
        values: The same shape.
        slots: ``[tokens]`` int64, counting from 0.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


def extend_workspace(layout: PageLayout, tokens: int, device: torch.device) -> ExtendWorkspace:
    """A workspace for runs of so many tokens, rounded up to whole pages."""
    tokens = -(-tokens // layout.page_tokens) * layout.page_tokens
    shape = (1, tokens, layout.num_kv_heads, layout.head_dim)
    return ExtendWorkspace(
        keys=torch.empty(shape, dtype=torch.float16, device=device),
        values=torch.empty(shape, dtype=torch.float16, device=device),
        slots=torch.arange(tokens, device=device),
    )


def extend_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: int,
    layout: PageLayout,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    num_sinks: int = 0,
    key_balance: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: ExtendWorkspace | None = None,
    plan: ExtendPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New queries of one sequence against a compressed prefix and the raw tokens after it; never waits.

    Args:
        query: ``[num_new, num_query_heads, head_dim]``, bf16, fp16 or float32, last dimension contiguous: the
            last num_new positions of the sequence; up to 16 query heads for each KV head.
        keys: ``[num_sinks + num_raw, num_kv_heads, head_dim]`` of the query's dtype: the first num_sinks
            positions of the sequence, then positions prefix_len and on; num_raw >= num_new.
        values: The same shape and dtype.
        pages: ``[num_pages, page_bytes]`` uint8.
        block_table: ``[max_pages]`` int32 or int64 page of every run of page_tokens tokens of the prefix.
        prefix_len: Tokens in the prefix.
        layout: Page geometry and codec; page_tokens a power of two up to 128, head_dim up to 256.
        softmax_scale: Factor on the scores.
        sliding_window: Attend only to the last so many positions up to the query's own, or to all; sinks have
            positions like all others.
        softcap: Scores s become ``softcap * tanh(s / softcap)``, or stay as they are.
        num_sinks: Positions at the start of the prefix for which `keys` and `values` are used, not pages.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys were divided when pages were made.
        out: Written and returned: the query's shape, any of its dtypes, last dimension contiguous.
        lse: Written and returned: ``[num_new, num_query_heads]`` float32.
        workspace: From `extend_workspace`; bounds what is inflated at once. By default one of 16384 tokens,
            or of the prefix, is made where the plan wants it.
        plan: Another plan than `plan_extend` makes.

    Returns:
        Output in the query's dtype, and the natural log-sum-exp of the scores in float32.

    Raises:
        ValueError: A shape, dtype, device or stride that the kernels do not serve, or a prefix that does not
            reach to the end of its sinks; the message names it.
    """
    _check(query, keys, values, pages, block_table, prefix_len, layout, num_sinks)
    check_mask(layout, query.device, sliding_window, softcap, num_sinks, key_balance)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    check_tensor("out", out, tuple(query.shape), FLOATS, pages.device)
    if lse is None:
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    check_tensor("lse", lse, tuple(query.shape[:-1]), (torch.float32,), pages.device, contiguous_dims=0)
    if plan is not None:
        _check_plan(plan, query, layout, masked=sliding_window is not None or softcap is not None)
        if workspace is not None and plan.variant == "inflate":
            _check_workspace(workspace, plan, layout, query.device)
    if not takes_kernel(query.device):
        results = reference_attention.extend_attention(
            query,
            keys,
            values,
            pages,
            block_table,
            prefix_len,
            layout,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
            num_sinks=num_sinks,
            key_balance=key_balance,
        )
        return out.copy_(results[0]), lse.copy_(results[1])
    if plan is None:
        plan = plan_extend(
            layout,
            machine_of(query.device),
            num_new=query.shape[0],
            num_query_heads=query.shape[1],
            prefix_len=prefix_len,
            sliding_window=sliding_window,
            softcap=softcap,
            workspace_tokens=workspace.keys.shape[1] if workspace else WORKSPACE_TOKENS,
            raw_bytes=query.element_size(),
        )
    if plan.variant == "inflate":
        workspace = workspace or extend_workspace(layout, plan.run_tokens, query.device)
        _check_workspace(workspace, plan, layout, query.device)
    _launch(
        plan,
        query,
        keys,
        values,
        pages,
        block_table,
        prefix_len,
        layout,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        num_sinks=num_sinks,
        key_balance=key_balance,
        out=out,
        lse=lse,
        workspace=workspace,
    )
    return out, lse


def _launch(
    plan: ExtendPlan,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: int,
    layout: PageLayout,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    num_sinks: int,
    key_balance: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: ExtendWorkspace | None,
) -> None:
    from tq_kernels import _launch as launch  # Triton is there on some platforms only
    from tq_kernels._launch_extend import launch_prefix, launch_raw

    heads, head_dim, columns = layout.num_kv_heads, layout.head_dim, plan.columns
    dtype = torch.float16 if plan.half_partials else torch.float32
    num_new = query.shape[0]
    num_raw = keys.shape[0] - num_sinks
    first_position = prefix_len + num_raw - num_new
    splits = plan.num_splits if prefix_len > num_sinks else 0
    extra_out = query.new_empty((1, heads, columns, head_dim), dtype=dtype)
    extra_lse = query.new_empty((1, heads, columns), dtype=torch.float32)
    partial_out = query.new_empty((1, heads, splits, columns, head_dim), dtype=dtype)
    partial_lse = query.new_empty((1, heads, splits, columns), dtype=torch.float32)
    launch_raw(
        plan,
        query=query,
        keys=keys,
        values=values,
        prefix_len=prefix_len,
        out=extra_out,
        lse=extra_lse,
        layout=layout,
        num_sinks=num_sinks,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    if splits:
        prepared = query.new_empty((1, heads, plan.padded_columns, head_dim), dtype=torch.float16)
        launch.launch_prepare(
            query=query[None],
            key_balance=key_balance,
            prepared=prepared,
            layout=layout,
            factor=launch.score_factor(softmax_scale, softcap),
        )
        if plan.decode is not None:
            launch.launch_split(
                plan.decode,
                prepared=prepared,
                pages=pages,
                block_table=block_table[None],
                lengths=_number(prefix_len, query.device),
                positions=_number(first_position + num_new - 1, query.device),
                partial_out=partial_out,
                partial_lse=partial_lse,
                layout=layout,
                rows=num_new,
                num_sinks=num_sinks,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        elif workspace is not None and plan.variant == "inflate":
            from tq_kernels._inflate import attend_inflated

            partial_out, partial_lse = attend_inflated(
                plan,
                workspace,
                prepared=prepared,
                pages=pages,
                block_table=block_table,
                prefix_len=prefix_len,
                layout=layout,
                num_sinks=num_sinks,
                extra_out=extra_out,
                extra_lse=extra_lse,
            )
        else:
            launch_prefix(
                plan,
                prepared=prepared,
                pages=pages,
                block_table=block_table,
                prefix_len=prefix_len,
                first_position=first_position,
                partial_out=partial_out,
                partial_lse=partial_lse,
                layout=layout,
                group=query.shape[1] // heads,
                num_sinks=num_sinks,
                sliding_window=sliding_window,
                softcap=softcap,
            )
    launch.launch_merge(
        partial_out=partial_out,
        partial_lse=partial_lse,
        extra_out=extra_out,
        extra_lse=extra_lse,
        out=out[None].unflatten(2, (heads, -1)),
        lse=lse[None].unflatten(2, (heads, -1)),
        layout=layout,
        merge_columns=plan.merge_columns,
        rotated=layout.spec.value.rotated,
        base_2=(plan.variant != "inflate", False),
    )


def _number(value: int, device: torch.device) -> torch.Tensor:
    """An int32 on the device, without waiting for it as a copy from the host would."""
    return torch.full((1,), value, dtype=torch.int32, device=device)


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: int,
    layout: PageLayout,
    num_sinks: int,
) -> None:
    page_shape(layout)
    check_pages(pages, layout)
    check_tensor("query", query, (None, None, layout.head_dim), FLOATS, pages.device)
    check_group(query.shape[1], layout)
    raw_shape = (None, layout.num_kv_heads, layout.head_dim)
    check_tensor("keys", keys, raw_shape, (query.dtype,), pages.device)
    check_tensor("values", values, (len(keys), *raw_shape[1:]), (query.dtype,), pages.device)
    check_tensor("block_table", block_table, (None,), (torch.int32, torch.int64), pages.device)
    if not 0 <= num_sinks <= prefix_len <= len(block_table) * layout.page_tokens:
        raise ValueError(
            f"{num_sinks} sinks do not lie within a prefix of {prefix_len} tokens, or these not within "
            f"{len(block_table)} pages"
        )
    num_new, num_raw = len(query), len(keys) - num_sinks
    if not 1 <= num_new <= num_raw:
        raise ValueError(f"{num_new} queries need at least one row and as many raw keys, not {num_raw}")


def _check_plan(plan: ExtendPlan, query: torch.Tensor, layout: PageLayout, *, masked: bool) -> None:
    columns = query.shape[0] * query.shape[1] // layout.num_kv_heads
    if (
        plan.columns != columns
        or layout.page_tokens % plan.tile_tokens
        or plan.run_tokens % layout.page_tokens
    ):
        raise ValueError(
            f"the plan is for {plan.columns} columns, tiles of {plan.tile_tokens} and runs of "
            f"{plan.run_tokens} tokens; there are {columns} columns and pages of {layout.page_tokens} tokens"
        )
    if plan.variant == "inflate" and masked:
        raise ValueError("a prefix is not inflated for a sliding window or a soft cap")


def _check_workspace(
    workspace: ExtendWorkspace, plan: ExtendPlan, layout: PageLayout, device: torch.device
) -> None:
    wanted = (1, plan.run_tokens, layout.num_kv_heads, layout.head_dim)
    got = tuple(workspace.keys.shape)
    if got[1] < wanted[1] or got[2:] != wanted[2:] or workspace.keys.device != device:
        raise ValueError(f"the workspace is {got} on {workspace.keys.device}, needed is {wanted} on {device}")
