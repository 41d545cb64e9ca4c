"""Put another attention function into a transformers model for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "quality"

ReadLayer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Layer, its newest queries ``[num_queries, num_heads, head_dim]``, and its keys and values ``[num_tokens,
num_kv_heads, head_dim]``, to the keys and values that attention sees."""

Observe = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Told of a layer, its queries ``[num_queries, num_heads, head_dim]``, keys, values and softmax scale."""

_QUERY_CHUNK = 128


@contextmanager
def reading_through(
    model: PreTrainedModel, read: ReadLayer | None, *, tail: int = 0, observe: Observe | None = None
) -> Iterator[None]:
    """Let attention of one sequence see what `read` makes of keys and values.

    Args:
        model: A causal language model with an exchangeable attention function.
        read: Called in every layer of every pass with the post-RoPE keys and values of all tokens so far;
            None to leave them.
        tail: Newest tokens that each query sees as they are.
        observe: Told of what went into every attention, before `read`.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = (side[0].transpose(0, 1) for side in (key, value))
        queries = query[0].transpose(0, 1)
        if observe is not None:
            observe(layer, queries, keys, values, scale)
        read_keys, read_values = (keys, values) if read is None else read(layer, queries, keys, values)
        if tail:
            mask = _visible(attention_mask, query.shape[2], key.shape[2], query.device)
            raw, seen = (keys, values), (read_keys, read_values)
            return _attend_with_tail(query[0], raw, seen, mask, tail, scale)[None].to(query.dtype), None
        seen_key, seen_value = (
            side.transpose(0, 1)[None].to(query.dtype) for side in (read_keys, read_values)
        )
        group = query.shape[1] // key.shape[1]  # repeated heads spare attention the whole matrix of scores
        output = scaled_dot_product_attention(
            query,
            seen_key.repeat_interleave(group, 1),
            seen_value.repeat_interleave(group, 1),
            attn_mask=attention_mask,
            is_causal=attention_mask is None and query.shape[2] > 1,
            scale=scale,
        )
        return output.transpose(1, 2), None

    with attending_by(model, ATTENTION_NAME, attend, sdpa_mask):
        yield


@contextmanager
def attending_by(
    model: PreTrainedModel, name: str, attend: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Let a model attend by a function of ours, with masks of another, until the context is left."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is no public way to read it
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _visible(
    mask: torch.Tensor | None, num_queries: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Which tokens each query sees: bool ``[num_queries, num_tokens]``."""
    if mask is not None:
        return (mask if mask.dtype == torch.bool else mask == 0)[0, 0, :, :num_tokens]
    return distances(num_queries, num_tokens, device) >= 0


def distances(num_queries: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """How far each token lies behind each of the newest queries: ``[num_queries, num_tokens]``."""
    positions = torch.arange(num_tokens, device=device)
    return positions[num_tokens - num_queries :, None] - positions


def _attend_with_tail(
    query: torch.Tensor,
    raw: tuple[torch.Tensor, torch.Tensor],
    seen: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor,
    tail: int,
    scale: float,
) -> torch.Tensor:
    """Attention ``[num_queries, num_heads, head_dim]`` where only tokens older than the tail are read."""
    group = query.shape[0] // raw[0].shape[1]
    (raw_keys, raw_values), (seen_keys, seen_values) = (
        [side.float().repeat_interleave(group, 1).transpose(0, 1) for side in pair] for pair in (raw, seen)
    )
    near = distances(query.shape[1], raw[0].shape[0], query.device) < tail
    outputs = []
    for start in range(0, query.shape[1], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        part = query[:, rows].float() * scale
        scores = torch.where(near[rows], part @ raw_keys.mT, part @ seen_keys.mT)
        weights = scores.masked_fill(~visible[rows], -torch.inf).softmax(-1)
        outputs.append((weights * near[rows]) @ raw_values + (weights * ~near[rows]) @ seen_values)
    return torch.cat(outputs, 1).transpose(0, 1)
