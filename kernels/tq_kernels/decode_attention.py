"""Decode attention over packed pages, split over the sequence: the kernel behind `reference_attention`.

The query is rotated once and brought into the order in which unpacked channels lie; a program then reads
the pages of one KV head for one run of pages, all query heads of the group together, and leaves a partial
output, still rotated, with its log-sum-exp. A second kernel merges the runs; the output is rotated back once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tq_kernels._unpack import all_groups
from tq_kernels.layout import WORD_FORMATS, PageLayout
from tq_kernels.reference import rotation_of
from tq_kernels.spec import KeyCenter

_LOG2_E = 1.4426950408889634
_PROGRAMS_PER_PROCESSOR = 4
_PROCESSORS_WITHOUT_A_GPU = 4
_TILE_TOKENS = 128
_DOT_DEPTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """How a decode is cut; a pure function of capacities, so that a captured graph stays right.

    Args:
        num_splits: Runs of pages per sequence.
        tile_tokens: Tokens a program holds at once.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    num_splits: int
    tile_tokens: int
    num_warps: int
    num_stages: int


def plan_decode(layout: PageLayout, num_seqs: int, max_pages: int, num_processors: int) -> LaunchPlan:
    """Enough splits to fill the machine, none shorter than a page."""
    programs = num_seqs * layout.num_kv_heads
    wanted = -(-num_processors * _PROGRAMS_PER_PROCESSOR // programs)
    tile_tokens = min(_TILE_TOKENS, layout.page_tokens & -layout.page_tokens)
    return LaunchPlan(
        num_splits=max(1, min(wanted, max_pages)), tile_tokens=tile_tokens, num_warps=4, num_stages=2
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
    query_positions: torch.Tensor | None = None,
    num_sinks: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query a sequence against the tokens in its pages, as `reference_attention.decode_attention` has it.

    Never waits for the device and launches a grid fixed by capacities, so it can be captured in a CUDA graph.

    Args:
        query: ``[num_seqs, num_query_heads, head_dim]``, at most 16 query heads a KV head.
        pages: ``[num_pages, page_bytes]`` uint8, rows contiguous.
        block_table: ``[num_seqs, max_pages]`` int32, last dimension contiguous; -1 past the end.
        lengths: ``[num_seqs]`` int32.
        layout: Page geometry and codec.
        softmax_scale: Factor on the scores.
        sliding_window: Attend only to the last so many positions up to the query's own, or to all.
        query_positions: ``[num_seqs]`` int32; by default ``lengths - 1``.
        num_sinks: Leave out the first so many positions.

    Returns:
        Output ``[num_seqs, num_query_heads, head_dim]`` and log-sum-exp ``[num_seqs, num_query_heads]``, both
        float32.

    Raises:
        ValueError: A shape, dtype or stride that the kernel does not serve.
    """
    _guard(query, pages, block_table, lengths, layout)
    num_seqs, num_query_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not num_seqs:
        return out, lse
    plan = plan_decode(layout, num_seqs, block_table.shape[1], _num_processors(query.device))
    rotated = query.float()
    if layout.spec.key.rotated:
        rotated = rotated @ rotation_of(layout, query.device).T
    rotated = (rotated * (softmax_scale * _LOG2_E)).to(torch.float16)
    positions = lengths - 1 if query_positions is None else query_positions
    partial = torch.empty(
        (num_seqs, num_query_heads, plan.num_splits, head_dim), dtype=torch.float32, device=query.device
    )
    partial_lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=query.device)
    key, value = WORD_FORMATS[layout.spec.key], WORD_FORMATS[layout.spec.value]
    _attend_split[(num_seqs, layout.num_kv_heads, plan.num_splits)](
        q_ptr=rotated,
        pages_ptr=pages,
        table_ptr=block_table,
        lengths_ptr=lengths,
        positions_ptr=positions,
        out_ptr=partial,
        lse_ptr=partial_lse,
        num_query_heads=num_query_heads,
        table_stride=block_table.stride(0),
        page_stride=pages.stride(0),
        num_splits=plan.num_splits,
        num_sinks=num_sinks,
        window=sliding_window or 0,
        GROUP=num_query_heads // layout.num_kv_heads,
        D=head_dim,
        D_TILE=triton.next_power_of_2(head_dim),
        P=layout.page_tokens,
        N=plan.tile_tokens,
        SECTION=layout.section_bytes,
        KEY=int(layout.spec.key),
        VALUE=int(layout.spec.value),
        K_GROUPS=key.groups,
        V_GROUPS=value.groups,
        V_LANES=value.lanes,
        K_TILE=triton.next_power_of_2(head_dim // key.groups),
        K_WORDS=_offset(layout, "key_words"),
        K_SIGNS=_offset(layout, "key_signs") - _offset(layout, "key_words"),
        V_WORDS=_offset(layout, "value_words"),
        V_SIGNS=_offset(layout, "value_signs") - _offset(layout, "value_words"),
        K_SCALES=_offset(layout, "key_scales"),
        V_SCALES=_offset(layout, "value_scales"),
        CENTER=_offset(layout, "key_center"),
        K_ROTATED=layout.spec.key.rotated,
        V_ROTATED=layout.spec.value.rotated,
        HAS_CENTER=layout.spec.key_center is not KeyCenter.NONE,
        PTX=torch.version.hip is None and query.device.type == "cuda",
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    _merge_splits[(num_seqs, num_query_heads)](
        partial_ptr=partial,
        partial_lse_ptr=partial_lse,
        out_ptr=out,
        lse_ptr=lse,
        num_splits=plan.num_splits,
        D=head_dim,
        D_TILE=triton.next_power_of_2(head_dim),
        S_TILE=triton.next_power_of_2(plan.num_splits),
    )
    return (out @ rotation_of(layout, query.device) if layout.spec.value.rotated else out), lse


@triton.jit
def _attend_split(
    q_ptr,
    pages_ptr,
    table_ptr,
    lengths_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    num_query_heads,
    table_stride,
    page_stride,
    num_splits,
    num_sinks,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SECTION: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_LANES: tl.constexpr,
    K_TILE: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_SIGNS: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_SIGNS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    CENTER: tl.constexpr,
    K_ROTATED: tl.constexpr,
    V_ROTATED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    PTX: tl.constexpr,
):
    i_seq, i_head, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # a tile is N tokens: of every group of the values' token axis, a run of N / V_GROUPS
    RUN: tl.constexpr = N // V_GROUPS
    TILES: tl.constexpr = P // N
    K_RUN: tl.constexpr = D // K_GROUPS
    length = tl.load(lengths_ptr + i_seq)
    position = tl.load(positions_ptr + i_seq)
    num_pages = (length + P - 1) // P
    per_split = (num_pages + num_splits - 1) // num_splits
    first_page = i_split * per_split
    last_page = tl.minimum(first_page + per_split, num_pages)
    first_seen = num_sinks
    if window > 0:
        first_seen = tl.maximum(first_seen, position - window + 1)

    o_row = tl.arange(0, 16)
    m_row = o_row < GROUP
    row = i_seq.to(tl.int64) * num_query_heads + i_head * GROUP + o_row
    o_k = tl.arange(0, K_TILE)
    m_k = o_k < K_RUN
    o_d = tl.arange(0, D_TILE)
    m_d = o_d < D
    o_run = tl.arange(0, RUN)
    o_vword = tl.arange(0, RUN // V_LANES)
    o_vbyte = tl.arange(0, V_LANES * D_TILE)
    p_q = q_ptr + row[None, :] * D + o_k[:, None]
    m_q = m_k[:, None] & m_row[None, :]
    b_q = (tl.load(p_q, mask=m_q, other=0.0),)
    for g in tl.static_range(1, K_GROUPS):
        b_q = b_q + (tl.load(p_q + g * K_RUN, mask=m_q, other=0.0),)  # noqa: RUF005 - triton has no stars

    b_out = tl.zeros([D_TILE, 16], dtype=tl.float32)
    b_max = tl.full([16], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([16], dtype=tl.float32)
    for tile in range(first_page * TILES, last_page * TILES):
        i_page = tile // TILES
        page = tl.load(table_ptr + i_seq.to(tl.int64) * table_stride + i_page).to(tl.int64)
        section = pages_ptr + page * page_stride + i_head * SECTION
        first_slot = (tile % TILES) * RUN
        b_center_score = tl.zeros([16], dtype=tl.float32)
        if HAS_CENTER:
            p_center = (section + CENTER).to(tl.pointer_type(tl.float16)) + o_k
            for g in tl.static_range(K_GROUPS):
                b_center = tl.load(p_center + g * K_RUN, mask=m_k, other=0.0).to(tl.float32)
                b_center_score += tl.sum(b_q[g].to(tl.float32) * b_center[:, None], axis=0)

        o_v = (first_slot // V_LANES + o_vword)[:, None] * (V_LANES * D) + o_vbyte[None, :]
        m_v = (o_vbyte < V_LANES * D)[None, :]
        b_v = all_groups(section + V_WORDS, o_v, m_v, VALUE, V_SIGNS, PTX)
        for v in tl.static_range(V_GROUPS):
            o_slot = v * (P // V_GROUPS) + first_slot + o_run
            o_token = i_page * P + o_slot
            m_token = (o_token < length) & (o_token >= first_seen) & (o_token <= position)
            o_keys = o_slot[:, None] * K_RUN + o_k[None, :]
            b_k = all_groups(section + K_WORDS, o_keys, m_k[None, :], KEY, K_SIGNS, PTX)
            b_s = tl.dot(b_k[0], b_q[0])
            for g in tl.static_range(1, K_GROUPS):
                b_s = tl.dot(b_k[g], b_q[g], b_s)
            if K_ROTATED:
                b_scale = tl.load((section + K_SCALES).to(tl.pointer_type(tl.float16)) + o_slot)
                b_s = b_s * b_scale.to(tl.float32)[:, None]
            b_s = tl.where(m_token[:, None], b_s + b_center_score[None, :], -float("inf"))

            b_next = tl.maximum(b_max, tl.max(b_s, axis=0))
            b_base = tl.where(b_next == -float("inf"), 0.0, b_next)
            b_p = tl.exp2(b_s - b_base[None, :])
            b_fade = tl.exp2(b_max - b_base)
            b_sum = b_sum * b_fade + tl.sum(b_p, axis=0)
            b_max = b_next
            b_out = b_out * b_fade[None, :]
            b_vt = tl.reshape(b_v[v], [RUN // V_LANES, D_TILE, V_LANES])
            b_vt = tl.reshape(tl.permute(b_vt, (1, 0, 2)), [D_TILE, RUN])
            if V_ROTATED:
                b_scale = tl.load((section + V_SCALES).to(tl.pointer_type(tl.float16)) + o_slot)
                b_scale = tl.where(m_token, b_scale.to(tl.float32), 0.0)
                # the largest scale stays outside, so that small probabilities do not underflow in float16
                b_largest = tl.maximum(tl.max(b_scale, axis=0), 1e-30)
                b_p = b_p * (b_scale / b_largest)[:, None]
                b_out += tl.dot(b_vt, b_p.to(tl.float16)) * b_largest
            else:
                b_out = tl.dot(b_vt, b_p.to(tl.float16), b_out)

    row_split = row * num_splits + i_split
    b_lse = b_max + tl.log2(b_sum)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[None, :]
    tl.store(lse_ptr + row_split, tl.where(b_sum > 0, b_lse, -float("inf")), mask=m_row)
    p_out = out_ptr + row_split[None, :] * D + o_d[:, None]
    tl.store(p_out, b_out, mask=m_row[None, :] & m_d[:, None])


@triton.jit
def _merge_splits(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    num_splits,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    S_TILE: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    o_split = tl.arange(0, S_TILE)
    o_d = tl.arange(0, D_TILE)
    m_split = o_split < num_splits
    m_d = o_d < D
    b_lse = tl.load(partial_lse_ptr + row * num_splits + o_split, mask=m_split, other=-float("inf"))
    b_max = tl.max(b_lse, axis=0)
    b_base = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_weight = tl.exp2(b_lse - b_base)
    b_total = tl.sum(b_weight, axis=0)
    p_partial = partial_ptr + (row * num_splits + o_split)[:, None] * D + o_d[None, :]
    b_out = tl.load(p_partial, mask=m_split[:, None] & m_d[None, :], other=0.0)
    b_out = tl.sum(b_out * b_weight[:, None], axis=0) / tl.where(b_total > 0, b_total, 1.0)
    tl.store(out_ptr + row * D + o_d, b_out, mask=m_d)
    b_total_lse = tl.where(b_total > 0, (b_base + tl.log2(b_total)) * LN_2, -float("inf"))
    tl.store(lse_ptr + row, b_total_lse)


def _guard(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageLayout,
) -> None:
    heads = layout.num_kv_heads
    if query.dim() != 3 or query.shape[1] % heads or query.shape[2] != layout.head_dim:
        raise ValueError(
            f"query must be [rows, a multiple of {heads} heads, {layout.head_dim}], not {list(query.shape)}"
        )
    if query.shape[1] > 16 * heads:
        raise ValueError(f"{query.shape[1] // heads} query heads a KV head are more than 16")
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != layout.page_bytes:
        raise ValueError(
            f"pages must be [num_pages, {layout.page_bytes}] uint8, not {list(pages.shape)} {pages.dtype}"
        )
    groups = WORD_FORMATS[layout.spec.value].groups
    if layout.page_tokens & -layout.page_tokens < _DOT_DEPTH * groups:
        raise ValueError(
            f"the kernel needs pages of a multiple of {_DOT_DEPTH * groups} tokens, not {layout.page_tokens}"
        )
    if pages.stride(1) != 1 or pages.stride(0) % 16:
        raise ValueError(f"pages must be contiguous rows a multiple of 16 bytes apart, not {pages.stride()}")
    if block_table.dtype != torch.int32 or block_table.stride(-1) != 1 or len(block_table) != len(query):
        raise ValueError("block_table must be [num_seqs, max_pages] int32 with contiguous rows")
    if lengths.dtype != torch.int32 or lengths.shape != query.shape[:1]:
        raise ValueError("lengths must be [num_seqs] int32")


def _offset(layout: PageLayout, name: str) -> int:
    plane = layout.plane(name)
    return plane.offset if plane else 0


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_A_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
