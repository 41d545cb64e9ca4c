"""Plain float32 PyTorch attention over packed pages: the truth that kernels are tested against.

Nothing is rotated back per token. With R the rotation, c the centre of a page and L the levels,
q . k = (R q) . c + scale_k * (R q) . L_k, and the output is R^T of the sum of p * scale_v * L_v.
Every function also returns the log-sum-exp of its scores, so that results over disjoint tokens can be merged.
"""

import torch

from tq_kernels.layout import PageLayout
from tq_kernels.reference import read_key_center, read_side, rotation_of

_FLOATS_AT_ONCE = 1 << 23
"""Bounds the score matrix and decoded pages in memory; longer prefixes go through in runs of pages."""


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest queries of every sequence against the tokens in its pages.

    Args:
        query: ``[num_seqs, num_query_heads, head_dim]``, or ``[num_seqs, rows, num_query_heads, head_dim]``
            for the last `rows` positions of a sequence; num_query_heads a multiple of the KV heads.
        pages: ``[num_pages, page_bytes]`` uint8.
        block_table: ``[num_seqs, max_pages]`` page of every run of page_tokens tokens; -1 past the end.
        lengths: ``[num_seqs]`` tokens to attend to; 0 gives zeros and a log-sum-exp of -inf.
        layout: Page geometry and codec.
        softmax_scale: Factor on the scores.
        sliding_window: Attend only to the last so many positions up to the query's own, or to all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``, or stay as they are.
        query_positions: ``[num_seqs]`` position of the last row; by default that of its last token in pages.
        num_sinks: Leave out the first so many positions of the pages, which the caller has raw.
        sink_keys: ``[num_seqs, num_sinks, num_kv_heads, head_dim]`` raw keys of these positions, attended to
            in place of what pages hold, where the window reaches.
        sink_values: The same shape; both or neither.
        sink_rows: ``[num_seqs]`` row of both that is each sequence's, by default its own number; a sequence
            with a negative one has no raw sinks, and nothing of its pages is left out.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys were divided when pages were made.

    Returns:
        Output of the query's shape and log-sum-exp of that shape without its last dimension, both float32.

    Raises:
        ValueError: Heads or channels of the query do not fit the layout.
    """
    _check_query(query[:, 0] if query.dim() == 4 else query, layout)
    if not len(query):
        return query.float(), query.new_empty(query.shape[:-1], dtype=torch.float32)
    rows = query if query.dim() == 4 else query[:, None]
    positions = lengths - 1 if query_positions is None else query_positions
    parts = []
    for seq in range(query.shape[0]):
        sink_row = seq if sink_rows is None else int(sink_rows[seq])
        raw_sinks = num_sinks if sink_row >= 0 else 0
        seen = min(int(positions[seq]) + 1, raw_sinks)
        first_position = int(positions[seq]) - rows.shape[1] + 1
        part = _attend_pages(
            rows[seq],
            pages,
            block_table[seq],
            int(lengths[seq]),
            layout,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
            first_position=first_position,
            num_sinks=raw_sinks,
            key_balance=key_balance,
        )
        if sink_keys is not None and sink_values is not None and seen > 0:
            sinks = _attend_raw(
                rows[seq],
                sink_keys[sink_row, :seen],
                sink_values[sink_row, :seen],
                torch.arange(seen, device=query.device),
                softmax_scale=softmax_scale,
                sliding_window=sliding_window,
                softcap=softcap,
                first_position=first_position,
            )
            part = merge_attention(*part, *sinks)
        parts.append(part)
    out, lse = (torch.stack(sides) for sides in zip(*parts, strict=True))
    return out.view(query.shape), lse.view(query.shape[:-1])


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """New queries of one sequence against a compressed prefix and the raw tokens after it.

    Args:
        query: ``[num_new, num_query_heads, head_dim]``, the last num_new positions of the sequence.
        keys: ``[num_sinks + num_raw, num_kv_heads, head_dim]``: the first num_sinks positions of the
            sequence, then positions prefix_len and on; num_raw >= num_new.
        values: The same shape.
        pages: ``[num_pages, page_bytes]`` uint8.
        block_table: ``[max_pages]`` page of every run of page_tokens tokens of the prefix.
        prefix_len: Tokens in the prefix.
        layout: Page geometry and codec.
        softmax_scale: Factor on the scores.
        sliding_window: Attend only to the last so many positions up to the query's own, or to all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``, or stay as they are.
        num_sinks: Positions at the start of the prefix for which `keys` and `values` are used, not pages.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys were divided when pages were made.

    Returns:
        Output ``[num_new, num_query_heads, head_dim]`` and log-sum-exp ``[num_new, num_query_heads]``, both
        float32.

    Raises:
        ValueError: The query does not fit the layout, has more rows than there are raw keys or none, or the
            prefix does not reach past its sinks.
    """
    _check_query(query, layout)
    if not 0 <= num_sinks <= prefix_len:
        raise ValueError(f"{num_sinks} sinks do not lie within a prefix of {prefix_len} tokens")
    num_new, num_raw = query.shape[0], keys.shape[0] - num_sinks
    if not 1 <= num_new <= num_raw:
        raise ValueError(f"{num_new} queries need at least one row and as many raw keys, not {num_raw}")
    first_position = prefix_len + num_raw - num_new
    sink_positions = torch.arange(num_sinks, device=query.device)
    own_positions = torch.arange(prefix_len, prefix_len + num_raw, device=query.device)
    own = _attend_raw(
        query,
        keys,
        values,
        torch.cat((sink_positions, own_positions)),
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        first_position=first_position,
    )
    prefix = _attend_pages(
        query,
        pages,
        block_table,
        prefix_len,
        layout,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        first_position=first_position,
        num_sinks=num_sinks,
        key_balance=key_balance,
    )
    return merge_attention(*prefix, *own)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of tokens, from the attention over each.

    Args:
        out_a: ``[..., head_dim]`` output over the first set.
        lse_a: ``[...]`` its log-sum-exp; -inf where the set is empty.
        out_b: Output over the second set.
        lse_b: Its log-sum-exp.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    floor = lse.clamp_min(torch.finfo(torch.float32).min)
    weight_a, weight_b = (torch.exp(part - floor)[..., None] for part in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse


def _attend_raw(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    first_position: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries against raw tokens, a bounded run of queries at a time."""
    num_query_heads = query.shape[1]
    num_keys, num_kv_heads, _ = keys.shape
    by_channel, by_token = keys.float().permute(1, 2, 0), values.float().transpose(0, 1)
    parts = []
    for run in query.split(max(1, _FLOATS_AT_ONCE // (num_query_heads * num_keys))):
        scores = _capped(_by_kv_head(run, num_kv_heads) @ by_channel * softmax_scale, softcap)
        _mask(scores, key_positions, first_position, run.shape[0], sliding_window)
        first_position += run.shape[0]
        out, lse = _softmax_values(scores, by_token)
        parts.append(
            (_by_query_head(out, run.shape[0]), _by_query_head(lse[..., None], run.shape[0])[..., 0])
        )
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend_pages(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    length: int,
    layout: PageLayout,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    first_position: int,
    num_sinks: int,
    key_balance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_new, num_query_heads, _ = query.shape
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full((num_new, num_query_heads), -torch.inf, device=query.device)
    if key_balance is not None:
        query = query.float() * key_balance.repeat_interleave(num_query_heads // layout.num_kv_heads, dim=0)
    if layout.spec.key.rotated:
        query = query.float() @ rotation_of(layout, query.device).T
    grouped = _by_kv_head(query, layout.num_kv_heads)
    per_token = max(num_new * num_query_heads, layout.num_kv_heads * layout.head_dim)
    pages_at_once = max(1, _FLOATS_AT_ONCE // (per_token * layout.page_tokens))
    num_pages = -(-length // layout.page_tokens)
    for start in range(0, num_pages, pages_at_once):
        run = block_table[start : min(start + pages_at_once, num_pages)]
        positions = torch.arange(len(run) * layout.page_tokens, device=query.device)
        positions = positions + start * layout.page_tokens
        scores = _capped(_page_scores(grouped, pages[run], layout) * softmax_scale, softcap)
        left_out = (positions >= length) | (positions < num_sinks)
        scores[..., left_out] = -torch.inf
        _mask(scores, positions, first_position, num_new, sliding_window)
        values = _page_values(pages[run], layout)
        values[:, left_out] = 0  # slots not written yet may hold anything, and 0 * nan is nan
        part, part_lse = _softmax_values(scores, values)
        out, lse = merge_attention(
            out, lse, _by_query_head(part, num_new), _by_query_head(part_lse[..., None], num_new)[..., 0]
        )
    if layout.spec.value.rotated:
        out = out @ rotation_of(layout, query.device)
    return out, lse


def _page_scores(grouped: torch.Tensor, pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Unscaled scores ``[num_kv_heads, group * num_new, num_pages * page_tokens]``."""
    levels, scales = read_side(pages, layout, "key")
    scores = grouped @ levels.permute(1, 3, 0, 2).flatten(2)
    if scales is not None:
        scores = scores * scales.transpose(0, 1).flatten(1)[:, None]
    center = read_key_center(pages, layout)
    if center is not None:
        per_page = grouped @ center.permute(1, 2, 0)
        scores = scores + per_page.repeat_interleave(layout.page_tokens, dim=-1)
    return scores


def _page_values(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Values, still rotated: ``[num_kv_heads, num_pages * page_tokens, head_dim]``."""
    levels, scales = read_side(pages, layout, "value")
    if scales is not None:
        levels = levels * scales[..., None]
    return levels.transpose(0, 1).flatten(1, 2)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _mask(
    scores: torch.Tensor,
    key_positions: torch.Tensor,
    first_position: int,
    num_new: int,
    sliding_window: int | None,
) -> None:
    """Hide keys after each query, and those its window has left behind. In place."""
    query_positions = first_position + torch.arange(num_new, device=scores.device)
    distance = query_positions[:, None] - key_positions
    hidden = distance < 0
    if sliding_window is not None:
        hidden |= distance >= sliding_window
    scores.view(scores.shape[0], -1, num_new, scores.shape[-1]).masked_fill_(hidden, -torch.inf)


def _softmax_values(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis times values, and log-sum-exp; rows that see nothing give zeros and -inf."""
    lse = torch.logsumexp(scores, dim=-1)
    floor = lse.clamp_min(torch.finfo(torch.float32).min)
    return torch.exp(scores - floor[..., None]) @ values, lse


def _by_kv_head(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[num_new, num_query_heads, dim]`` as float32 ``[num_kv_heads, group * num_new, dim]``."""
    return query.float().transpose(0, 1).reshape(num_kv_heads, -1, query.shape[-1])


def _by_query_head(tensor: torch.Tensor, num_new: int) -> torch.Tensor:
    """Undo `_by_kv_head`: ``[num_new, num_query_heads, dim]``."""
    return tensor.reshape(-1, num_new, tensor.shape[-1]).transpose(0, 1)


def _check_query(query: torch.Tensor, layout: PageLayout) -> None:
    if query.dim() != 3 or query.shape[1] % layout.num_kv_heads or query.shape[2] != layout.head_dim:
        raise ValueError(
            f"query must be [rows, a multiple of {layout.num_kv_heads} heads, {layout.head_dim}], "
            f"not {list(query.shape)}"
        )
