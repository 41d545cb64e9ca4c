"""The launches of decode attention on Hopper: prepare columns, unless splits do, attend over splits, merge.

Each begins before the one before it has ended and waits for it on the device, where it needs its results.
"""

import math
from functools import lru_cache

import torch

from tq_kernels import hopper
from tq_kernels._cell_words import cell_words
from tq_kernels._page_shape import page_shape
from tq_kernels.cells import RANGES
from tq_kernels.codebook import LEVELS, TARGETS
from tq_kernels.compiled import launch
from tq_kernels.decode_plan import DecodePlan
from tq_kernels.device.hopper_append import append_tokens
from tq_kernels.device.hopper_columns import merge_columns, prepare_columns
from tq_kernels.device.hopper_decode import attend_split
from tq_kernels.layout import WORD_FORMATS, PageLayout
from tq_kernels.reference import likeness_without_gain, value_gain
from tq_kernels.rotation import rotation_signs

_COLUMNS_AT_ONCE = 4
_SPLITS_AT_ONCE = 8
_MOST_MERGE_WARPS = 16


def launch_prepare(
    *,
    query: torch.Tensor,
    key_balance: torch.Tensor | None,
    prepared: torch.Tensor,
    layout: PageLayout,
    factor: float,
) -> None:
    """Bring queries ``[num_seqs, rows, num_query_heads, head_dim]`` into columns."""
    num_seqs, rows, num_query_heads, head_dim = query.shape
    padded = prepared.shape[2]
    group = num_query_heads // layout.num_kv_heads
    seq_stride, row_stride, head_stride, _ = query.stride()
    launch(
        prepare_columns,
        (padded // _COLUMNS_AT_ONCE, layout.num_kv_heads, num_seqs),
        _prepare_constants(head_dim, group, rows, padded),
        p_query=query,
        p_balance=key_balance,
        p_signs=_signs(layout, query.device),
        p_prepared=prepared,
        num_kv_heads=layout.num_kv_heads,
        factor=factor / head_dim,
        query_seq_stride=seq_stride,
        query_row_stride=row_stride,
        query_head_stride=head_stride,
    )


@lru_cache(maxsize=64)
def _prepare_constants(head_dim: int, group: int, rows: int, padded: int) -> dict[str, object]:
    return {
        "GROUP": group,
        "COLUMNS": rows * group,
        "PADDED": padded,
        "D": head_dim,
        "R": _COLUMNS_AT_ONCE,
        "num_warps": _COLUMNS_AT_ONCE,
        "launch_pdl": True,
    }


def launch_split(
    plan: DecodePlan,
    *,
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor | None,
    sink_rows: torch.Tensor | None,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    layout: PageLayout,
    rows: int,
    num_sinks: int,
    sliding_window: int | None,
    softcap: float | None,
    cap_log2: float,
    early: bool,
    raw: bool = False,
    key_balance: torch.Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Attend every split of every sequence and KV head; see `decode_attention` for the tensors.

    The query is prepared, or raw as the caller of `decode_attention` has it, with rows; balance and factor
    are for the latter. An early launch begins while the one before still runs.
    """
    seq_stride, row_stride, head_stride = query.stride()[:3] if raw else (0, 0, 0)
    fixed = hopper.constants(
        layout,
        rows=rows,
        group=plan.columns // rows,
        padded=plan.padded_columns,
        tile_columns=plan.tile_columns,
        window=sliding_window is not None,
        softcap=softcap is not None,
        raw=raw,
    )
    launch(
        attend_split,
        (plan.num_splits, layout.num_kv_heads * fixed["BLOCKS"], lengths.shape[0]),
        fixed,
        p_query=query,
        p_pages=pages,
        p_table=block_table,
        p_lengths=lengths,
        p_positions=positions,
        p_sink_rows=sink_rows,
        p_balance=key_balance,
        p_signs=_signs(layout, query.device) if raw else None,
        p_out=partial_out,
        p_lse=partial_lse,
        table_stride=block_table.stride(0),
        page_stride=pages.stride(0),
        query_seq_stride=seq_stride,
        query_row_stride=row_stride,
        query_head_stride=head_stride,
        num_splits=plan.num_splits,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        factor=factor / layout.head_dim,
        cap_log2=cap_log2,
        num_warps=plan.num_warps,
        launch_pdl=early,
        maxnreg=plan.num_registers,
    )


def launch_merge(
    *,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    query: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PageLayout,
    sink_keys: torch.Tensor | None,
    sink_values: torch.Tensor | None,
    sink_rows: torch.Tensor | None,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Merge splits and raw sinks, rotate outputs back; tensors are those of `decode_attention`."""
    num_seqs, rows, num_query_heads, head_dim = query.shape
    group = num_query_heads // layout.num_kv_heads
    num_splits = partial_lse.shape[2]
    query_strides, out_strides, lse_strides = query.stride(), out.stride(), lse.stride()
    sink_strides = query_strides if sink_keys is None else sink_keys.stride()
    launch(
        merge_columns,
        (rows * group, layout.num_kv_heads, num_seqs),
        _merge_constants(
            head_dim,
            group,
            _splits_at_once(num_splits),
            0 if sink_keys is None else sink_keys.shape[1],
            sliding_window is not None,
            softcap is not None,
        ),
        p_partial=partial_out,
        p_partial_lse=partial_lse,
        p_query=query,
        p_sink_keys=sink_keys,
        p_sink_values=sink_values,
        p_sink_rows=sink_rows,
        p_lengths=lengths,
        p_positions=positions,
        p_signs=_signs(layout, query.device),
        p_out=out,
        p_lse=lse,
        num_kv_heads=layout.num_kv_heads,
        num_columns=rows * group,
        num_splits=num_splits,
        query_seq_stride=query_strides[0],
        query_row_stride=query_strides[1],
        query_head_stride=query_strides[2],
        sink_seq_stride=sink_strides[0],
        sink_token_stride=sink_strides[1],
        sink_head_stride=sink_strides[2],
        out_seq_stride=out_strides[0],
        out_row_stride=out_strides[1],
        out_head_stride=out_strides[2],
        lse_seq_stride=lse_strides[0],
        lse_row_stride=lse_strides[1],
        lse_head_stride=lse_strides[2],
        score_factor=softmax_scale * math.log2(math.e) if softcap is None else softmax_scale / softcap,
        cap_log2=(softcap or 0.0) * math.log2(math.e),
        window=sliding_window or 0,
    )


def _splits_at_once(num_splits: int) -> tuple[int, int]:
    """Warps of a program that merges so many splits, and splits that each of them reads at once."""
    runs = -(-num_splits // _SPLITS_AT_ONCE)
    num_warps = min(_MOST_MERGE_WARPS, 1 << (runs - 1).bit_length())
    return num_warps, min(_SPLITS_AT_ONCE, 1 << (num_splits - 1).bit_length())


@lru_cache(maxsize=64)
def _merge_constants(
    head_dim: int, group: int, cut: tuple[int, int], num_sinks: int, window: bool, softcap: bool
) -> dict[str, object]:
    num_warps, at_once = cut
    return {
        "GROUP": group,
        "D": head_dim,
        "W": num_warps,
        "U": at_once,
        "SINKS": num_sinks,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "num_warps": num_warps,
        "launch_pdl": True,
    }


@lru_cache(maxsize=32)
def append_constants(layout: PageLayout) -> dict[str, object]:
    """Constants of `append_tokens`, those of the Lloyd-Max codes among them, whose levels are in quarters."""
    sides = [
        (
            int(code),
            WORD_FORMATS[code].groups,
            TARGETS[code] * layout.head_dim**0.5 / RANGES[code],
            likeness_without_gain(code, layout.head_dim),
            tuple(int(4 * level) for level in LEVELS[code]),
        )
        for code in (layout.spec.key, layout.spec.value)
    ]
    return {
        "SHAPE": page_shape(layout),
        "KEY": sides[0],
        "VALUE": sides[1],
        "VALUE_GAIN": value_gain(layout.spec.value),
    }


def launch_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor | None,
    key_balance: torch.Tensor | None,
    sinks: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Write tokens, no two of a page; see `quantize.quantize_slots` for the tensors."""
    sink_slots, sink_keys, sink_values = sinks
    key_strides, value_strides = keys.stride(), values.stride()
    sink_strides = (0, 0) if sink_keys is None else sink_keys.stride()
    launch(
        append_tokens,
        (layout.num_kv_heads, keys.shape[0], 2),
        append_constants(layout),
        p_keys=keys,
        p_values=values,
        p_slots=slot_mapping,
        p_seeds=seed_pages,
        p_balance=key_balance,
        p_signs=_signs(layout, keys.device),
        p_cells=cell_words(layout, keys.device),
        p_pages=pages,
        p_sink_slots=sink_slots,
        p_sink_keys=sink_keys,
        p_sink_values=sink_values,
        key_token_stride=key_strides[0],
        key_head_stride=key_strides[1],
        value_token_stride=value_strides[0],
        value_head_stride=value_strides[1],
        page_stride=pages.stride(0),
        sink_token_stride=sink_strides[0],
        sink_head_stride=sink_strides[1],
        num_warps=1,
        launch_pdl=True,
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a constant first used in inference mode must serve outside it too
def _signs(layout: PageLayout, device: torch.device) -> torch.Tensor:
    """Signs of the first round of the rotation, then of the second: float32 ``[2 * head_dim]``."""
    return torch.tensor(rotation_signs(layout.head_dim, layout.spec.rotation_seed), device=device)
