"""What attention sees of a cache that some method keeps, with the first tokens raw."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality.methods.base import Method, Place, Sides

_GROWTH_TOKENS = 256


class CacheView:
    """Reads layers through a method; one object for one sequence, which may grow from call to call.

    Groups that are full are read once, since more tokens do not change them; a call reads the open group
    again and those that came. What was read takes as much memory as the cache itself, in its dtype.

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
        self._seen: dict[int, _Seen] = {}

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_tokens, num_kv_heads, head_dim]`` as attention sees them.

        They are good until the next call for the layer, which writes over those of the open group.
        """
        num_tokens = keys.shape[0]
        if num_tokens <= self._num_sinks:
            return keys, values
        if layer not in self._states:
            first = self._num_sinks, self._state_tokens
            self._states[layer] = state_of(self._method, queries, keys, values, *first)
        seen = self._seen.setdefault(layer, _Seen())
        done = seen.num_finished
        place = Place(layer=layer, num_layers=self._num_layers, num_sinks=max(0, self._num_sinks - done))
        read = self._method.read(keys[done:].float(), values[done:].float(), self._states[layer], place)
        group = self._method.group_tokens
        return seen.updated((keys, values), read, self._num_sinks, num_tokens // group * group)

    def state(self, layer: int) -> Any:
        """State of a layer that was read."""
        return self._states[layer]


class _Seen:
    """What attention sees of one layer: what is finished, and room for more."""

    def __init__(self) -> None:
        self.num_finished = 0
        """First tokens that no later token changes."""
        self._room: list[torch.Tensor] = []

    def updated(self, raw: Sides, read: Sides, num_sinks: int, num_finished: int) -> Sides:
        """Take in what was read of all tokens that were not finished, and return all.

        Args:
            raw: Keys and values of all tokens, of which the sinks are taken.
            read: Keys and values of those that were not finished.
            num_sinks: First tokens that stay raw, fewer than there are.
            num_finished: Those finished now.
        """
        num_tokens = raw[0].shape[0]
        if not self._room or self._room[0].shape[0] < num_tokens:
            self._room = [self._grown(side, number) for number, side in enumerate(raw)]
        for room, side, part in zip(self._room, raw, read, strict=True):
            room[self.num_finished : num_tokens] = part
            room[:num_sinks] = side[:num_sinks]
        if num_finished > num_sinks:
            self.num_finished = num_finished
        return self._room[0][:num_tokens], self._room[1][:num_tokens]

    def _grown(self, side: torch.Tensor, number: int) -> torch.Tensor:
        """Room for the tokens of a side and some more, with the finished ones in it."""
        room = side.new_empty((side.shape[0] // _GROWTH_TOKENS + 1) * _GROWTH_TOKENS, *side.shape[1:])
        if self.num_finished:
            room[: self.num_finished] = self._room[number][: self.num_finished]
        return room


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
