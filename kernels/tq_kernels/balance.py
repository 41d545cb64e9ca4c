"""Channel balance of keys: what keys are divided by, and queries multiplied by, before the rotation.

A rotation spreads the error of a key evenly over all channels, whatever they are worth. With b the balance,
channel j then errs by b_j. In a product with a query whose channel is q_j and by a key whose channels are
k_j / b_j, the variance of the product's error is proportional to (sum of q_j^2 b_j^2)(sum of k_j^2 / b_j^2).
By Cauchy and Schwarz no b makes it smaller than b_j^2 = rms(k_j) / rms(q_j) does. The k_j are deviations from
the mean of a page, which the centre takes out.
"""

import torch

LARGEST_RATIO = 64.0
"""A channel's balance is at most so far from the geometric mean of its head, which is 1."""
_SMALLEST_RMS = 1e-6
"""Channels below it count as that large: dead ones must not reach infinity."""


def estimate_balance(
    queries: torch.Tensor, keys: torch.Tensor, *, page_tokens: int, num_sinks: int
) -> torch.Tensor:
    """Balance of one layer from some tokens of any text; a page's worth is enough, a few hundred are better.

    Args:
        queries: ``[num_tokens, num_query_heads, head_dim]``, as they meet keys; a multiple of the KV heads.
        keys: ``[num_tokens, num_kv_heads, head_dim]``, after any rotary embedding.
        page_tokens: Tokens that share a centre.
        num_sinks: First tokens to leave out; their keys are like no others.

    Returns:
        ``[num_kv_heads, head_dim]`` float32, within `LARGEST_RATIO` of 1, every number a bfloat16 so that no
        order of summation shows.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not finite, or no token but sinks.
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    if queries.dim() != 3 or queries.shape[0] != num_tokens or queries.shape[2] != head_dim:
        raise ValueError(f"queries {list(queries.shape)} do not go with keys {list(keys.shape)}")
    if queries.shape[1] % num_kv_heads:
        raise ValueError(f"{queries.shape[1]} query heads are not a multiple of {num_kv_heads} KV heads")
    if num_tokens - num_sinks < 2:
        raise ValueError(f"{num_tokens} tokens of which {num_sinks} are sinks tell nothing of the others")
    queries, keys = queries[num_sinks:].float(), keys[num_sinks:].float()
    if not (torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise ValueError("queries and keys must be finite")
    spread = torch.cat([run - run.mean(dim=0) for run in _runs(keys, page_tokens)])
    by_kv_head = queries.unflatten(1, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    ratio = _rms(spread) / _rms(by_kv_head)
    balance = ratio.sqrt()
    balance = balance / balance.log().mean(dim=-1, keepdim=True).exp()
    return balance.clamp(1 / LARGEST_RATIO, LARGEST_RATIO).to(torch.bfloat16).float()


def _runs(keys: torch.Tensor, page_tokens: int) -> list[torch.Tensor]:
    """Whole runs of `page_tokens`, or all tokens where there is none."""
    whole = keys.shape[0] // page_tokens * page_tokens
    return list(keys[:whole].split(page_tokens)) if whole else [keys]


def _rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(dim=0).sqrt().clamp_min(_SMALLEST_RMS)
