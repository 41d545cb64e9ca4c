"""The prefix inflated in bounded runs, each attended by a library that returns log-sum-exps, and merged."""

import torch

from tq_kernels._launch import LOG2_E, launch_merge
from tq_kernels.dequantize import dequantize_pages
from tq_kernels.extend_attention import ExtendWorkspace
from tq_kernels.extend_plan import ExtendPlan, Library
from tq_kernels.layout import PageLayout


def attend_inflated(
    plan: ExtendPlan,
    workspace: ExtendWorkspace,
    *,
    prepared: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: int,
    layout: PageLayout,
    num_sinks: int,
    extra_out: torch.Tensor,
    extra_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with prepared columns over the prefix, in the rotated domain.

    The prefix must reach past its sinks. All runs but the last are merged into `extra_out`
    ``[1, num_kv_heads, columns, head_dim]`` float32 and `extra_lse`, in base 2, which hold a partial result
    already; the last is left to the final merge.

    Returns:
        Output ``[1, num_kv_heads, 1, columns, head_dim]`` float16 of the last run, and its log-sum-exp in
        natural units.
    """
    page_tokens, heads, columns = layout.page_tokens, layout.num_kv_heads, plan.columns
    out, lse = prepared.new_empty(0), extra_lse
    for start in range(0, prefix_len, plan.run_tokens):
        tokens = min(plan.run_tokens, prefix_len - start)
        first = max(0, min(num_sinks - start, tokens))
        if first == tokens:
            continue
        if len(out):
            launch_merge(
                partial_out=out,
                partial_lse=lse,
                extra_out=extra_out,
                extra_lse=extra_lse,
                out=extra_out.view(1, heads, 1, columns, -1).permute(0, 3, 1, 2, 4),
                lse=extra_lse.view(1, heads, 1, columns).permute(0, 3, 1, 2),
                layout=layout,
                merge_columns=plan.merge_columns,
                rotated=False,
                base_2=(False, True),
            )
        run = block_table[start // page_tokens : -(-(start + tokens) // page_tokens)]
        dequantize_pages(
            pages,
            run.to(torch.int32),
            workspace.keys,
            workspace.values,
            workspace.slots[: len(run) * page_tokens],
            layout,
            rotated=True,
        )
        keys, values = (side[:, first:tokens].transpose(1, 2) for side in (workspace.keys, workspace.values))
        out, lse = _library_attention(plan.library, prepared, keys, values)
        out, lse = out[:, :, None, :columns], lse.reshape(1, heads, 1, -1)[..., :columns]
    return out, lse


def _library_attention(
    library: Library, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and natural log-sum-exp; the query bears the scale of scores in base 2."""
    # what scaled_dot_product_attention calls; it would keep the log-sum-exps to itself
    scale = 1 / LOG2_E
    if library == "cudnn":
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001
        results = attend(query, keys, values, None, True, scale=scale)
    elif library == "flash":
        attend = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
        results = attend(query, keys, values, scale=scale)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        results = attend(query, keys, values, scale=scale)
    return results[0], results[1]
