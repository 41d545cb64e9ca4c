"""Passes of a model over a text: uncompressed, through a method, or to learn a method's state."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality.cache_view import CacheView, state_of
from benchmarks.quality.conditions import Conditions
from benchmarks.quality.methods.base import Method
from benchmarks.quality.models import LoadedModel
from benchmarks.quality.substitute import Observe, ReadLayer, reading_through

States = dict[str, list[Any]]
"""State of every layer, by name of the method."""


def logits_of(
    loaded: LoadedModel, token_ids: Sequence[int], read: ReadLayer | None, *, tail: int = 0
) -> torch.Tensor:
    """Logits ``[num_tokens, vocabulary]`` of one text with attention reading through `read`."""
    with torch.inference_mode(), reading_through(loaded.model, read, tail=tail):
        logits: torch.Tensor = loaded.model(input_ids=_batch(loaded, token_ids), use_cache=False).logits[0]
    return logits


def observe_pass(loaded: LoadedModel, token_ids: Sequence[int], observe: Observe) -> None:
    """Show what goes into every attention of an uncompressed pass over one text."""
    with torch.inference_mode(), reading_through(loaded.model, None, observe=observe):
        loaded.model(input_ids=_batch(loaded, token_ids), use_cache=False, logits_to_keep=1)


def states_of_text(
    loaded: LoadedModel, token_ids: Sequence[int], methods: Sequence[Method], conditions: Conditions
) -> States:
    """States of all methods from the first tokens of a text."""
    states: States = {method.name: [] for method in methods}

    def observe(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        for method in methods:
            first = conditions.num_sinks, conditions.state_tokens
            state = state_of(method, queries, keys, values, *first)
            states[method.name].append(state)

    observe_pass(loaded, token_ids[: conditions.state_tokens], observe)
    return states


def view_of(loaded: LoadedModel, method: Method, states: States | None, conditions: Conditions) -> CacheView:
    """What attention sees of one new sequence."""
    return CacheView(
        method,
        loaded.geometry.num_layers,
        conditions.num_sinks,
        states=states[method.name] if states else None,
        state_tokens=conditions.state_tokens,
    )


def _batch(loaded: LoadedModel, token_ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(token_ids)], device=loaded.model.device)
