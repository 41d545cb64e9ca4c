"""Run a model over texts, once uncompressed and once through every method, and say what each method costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.quality.cache_view import CacheView, state_of
from benchmarks.quality.logits import LogitLoss, compare, summary
from benchmarks.quality.methods.base import Method
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.rows import Row
from benchmarks.quality.substitute import ReadLayer, reading_through

StateFrom = Literal["other", "same"]
"""Whether states come from the start of another text or of the sequence itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is the same for all methods.

    Args:
        num_sinks: First tokens that stay raw.
        tail: Newest tokens that every query sees raw.
        state_from: Where states come from.
        state_tokens: From how many tokens, sinks included.
    """

    num_sinks: int = 4
    tail: int = 0
    state_from: StateFrom = "other"
    state_tokens: int = 256


def logits_of(
    loaded: LoadedModel, token_ids: Sequence[int], read: ReadLayer | None, *, tail: int = 0
) -> torch.Tensor:
    """Logits ``[num_tokens, vocabulary]`` of one text with attention reading through `read`."""
    with torch.inference_mode(), reading_through(loaded.model, read, tail=tail):
        inputs = torch.tensor([list(token_ids)], device=loaded.model.device)
        logits: torch.Tensor = loaded.model(input_ids=inputs, use_cache=False).logits[0]
    return logits


def states_of_text(
    loaded: LoadedModel, token_ids: Sequence[int], methods: Sequence[Method], conditions: Conditions
) -> dict[str, list[Any]]:
    """State of every layer for every method, by its name, from the first tokens of a text."""
    states: dict[str, list[Any]] = {method.name: [] for method in methods}

    def observe(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        for method in methods:
            state = state_of(method, keys, values, conditions.num_sinks, conditions.state_tokens)
            states[method.name].append(state)

    with torch.inference_mode(), reading_through(loaded.model, None, observe=observe):
        inputs = torch.tensor([list(token_ids)[: conditions.state_tokens]], device=loaded.model.device)
        loaded.model(input_ids=inputs, use_cache=False, logits_to_keep=1)
    return states


def measure_logits(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    methods: Sequence[Method],
    conditions: Conditions,
    states: dict[str, list[Any]] | None,
) -> Iterator[tuple[Method, LogitLoss]]:
    """Loss of every method on every text, text after text; each needs one pass of the model."""
    for token_ids in texts:
        reference = logits_of(loaded, token_ids, None)
        for method in methods:
            view = CacheView(
                method,
                loaded.geometry.num_layers,
                conditions.num_sinks,
                states=states[method.name] if states else None,
                state_tokens=conditions.state_tokens,
            )
            logits = logits_of(loaded, token_ids, view, tail=conditions.tail)
            yield method, compare(reference, logits, token_ids)


def logit_row(loaded: LoadedModel, method: Method, losses: Sequence[LogitLoss], num_sinks: int) -> Row:
    """Sizes and logit losses of one method, for a row."""
    num_tokens = len(losses[0].kl)
    return {
        "bytes_per_token": method.total_bytes(loaded.geometry, num_tokens, num_sinks) / num_tokens,
        "bytes_per_token_bf16": loaded.geometry.raw_bytes_per_token,
        **summary(losses),
    }
