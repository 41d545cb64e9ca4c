"""What attention sees of a cache that some method keeps, with the first tokens raw."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality.methods.base import Method, Place, Sides


class CacheView:
    """Reads layers through a method; one object for one sequence, which may grow from call to call.

    Args:
        method: How keys and values are kept.
        num_layers: Of the model.
        num_sinks: First tokens that stay raw.
        states: State of every layer, or None to estimate each from the sequence's own first tokens; the
            first call must then bring the queries of all of them.
        state_tokens: How many of them, sinks included.
    """

    def __init__(
        self,
        method: Method,
        num_layers: int,
        num_sinks: int,
        *,
        states: Sequence[Any] | None = None,
        state_tokens: int = 256,
    ) -> None:
        self._method = method
        self._num_layers = num_layers
        self._num_sinks = num_sinks
        self._states: dict[int, Any] = dict(enumerate(states or ()))
        self._state_tokens = state_tokens
        self._finished: dict[int, Sides] = {}

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_tokens, num_kv_heads, head_dim]`` as attention sees them."""
        if keys.shape[0] <= self._num_sinks:
            return keys, values
        if layer not in self._states:
            first = self._num_sinks, self._state_tokens
            self._states[layer] = state_of(self._method, queries, keys, values, *first)
        done = self._finished[layer][0].shape[0] if layer in self._finished else 0
        place = Place(layer=layer, num_layers=self._num_layers, num_sinks=max(0, self._num_sinks - done))
        seen = self._method.read(keys[done:].float(), values[done:].float(), self._states[layer], place)
        if layer in self._finished:
            before = self._finished[layer]
            seen = torch.cat((before[0], seen[0])), torch.cat((before[1], seen[1]))
        self._finish(layer, seen)
        return self._with_sinks(keys, seen[0]), self._with_sinks(values, seen[1])

    def _finish(self, layer: int, seen: Sides) -> None:
        """Remember what was read of groups that are full: more tokens will not change them."""
        group = self._method.group_tokens
        num_finished = seen[0].shape[0] // group * group
        if num_finished > self._num_sinks:
            self._finished[layer] = seen[0][:num_finished], seen[1][:num_finished]

    def _with_sinks(self, raw: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return torch.cat((raw[: self._num_sinks], seen[self._num_sinks :].to(raw)))


def state_of(
    method: Method,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_sinks: int,
    state_tokens: int,
) -> Any:
    """State of one layer from the first tokens of a sequence, sinks left out."""
    part = slice(num_sinks, state_tokens)
    return method.estimate(queries[part].float(), keys[part].float(), values[part].float())
