"""What attention sees of several sequences that grow in step, each with the first tokens raw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.conditions import Conditions
from benchmarks.quality.methods.base import Method, Place, Sides


class StepView:
    """Keys and values of some sequences of different lengths, one token a sequence longer with every pass.

    A method reads the open groups of all sequences at once, as if they were more heads of one sequence. What
    an open group lacks is filled with its mean key and with zeros, which change nothing of the tokens in it:
    no centre, no range, no scale of a token.

    Args:
        method: How keys and values are kept.
        num_layers: Of the model.
        conditions: Sinks and tail.
        lengths: Tokens of each sequence at first.
        num_more: By how many tokens they may grow.
    """

    def __init__(
        self, method: Method, num_layers: int, conditions: Conditions, lengths: Sequence[int], num_more: int
    ) -> None:
        self._method, self._num_layers, self._conditions = method, num_layers, conditions
        self._lengths = list(lengths)
        self._room_tokens = -(-(max(lengths) + num_more) // method.group_tokens) * method.group_tokens
        self._raw: dict[int, Sides] = {}
        self._seen: dict[int, Sides] = {}
        self._states: dict[int, list[Any]] = {}
        self._joined: dict[int, Any] = {}
        self._newest: _Newest | None = None

    def begin(self, layer: int, row: int, raw: Sides, seen: Sides, state: Any) -> None:
        """Take in one layer of one sequence; all sequences in their order before the first `step`.

        Args:
            layer: Which layer.
            row: Which sequence.
            raw: Keys and values ``[num_tokens, num_kv_heads, head_dim]``.
            seen: The same as attention sees them.
            state: Of the method.
        """
        if layer not in self._raw:
            shape = len(self._lengths), self._room_tokens, *raw[0].shape[1:]
            self._raw[layer] = raw[0].new_zeros(shape), raw[1].new_zeros(shape)
            self._seen[layer] = raw[0].new_zeros(shape), raw[1].new_zeros(shape)
            self._states[layer] = []
        for rooms, sides in ((self._raw[layer], raw), (self._seen[layer], seen)):
            for room, side in zip(rooms, sides, strict=True):
                room[row, : side.shape[0]] = side
        self._states[layer].append(state)

    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all sequences but these, which are numbered anew in this order."""
        for layer in self._raw:
            index = torch.tensor(list(rows), device=self._raw[layer][0].device)
            for sides in (self._raw, self._seen):
                sides[layer] = sides[layer][0][index], sides[layer][1][index]
        self._states = {layer: [states[row] for row in rows] for layer, states in self._states.items()}
        self._joined = {}
        self._lengths = [self._lengths[row] for row in rows]

    def advance(self, device: torch.device) -> torch.Tensor:
        """Make every sequence a token longer; positions of the new tokens, ``[num_sequences]``."""
        group = self._method.group_tokens
        positions = torch.tensor(self._lengths, device=device)[:, None]
        self._lengths = [length + 1 for length in self._lengths]
        index = positions // group * group + torch.arange(group, device=device)
        tokens = torch.arange(max(self._lengths), device=device)
        self._newest = _Newest(
            rows=torch.arange(len(positions), device=device)[:, None],
            positions=positions,
            group=index,
            is_in_group=(index <= positions)[:, :, None, None],
            is_there=tokens <= positions,
            is_near=(positions - tokens < self._conditions.tail)[:, :, None, None],
        )
        return positions[:, 0]

    def step(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take in the new token of every sequence in one layer, and show all tokens.

        Args:
            layer: Which layer.
            keys: ``[num_sequences, num_kv_heads, head_dim]``, after RoPE.
            values: The same shape.

        Returns:
            Keys and values ``[num_sequences, num_tokens, num_kv_heads, head_dim]``, and which of the tokens
            are there, ``[num_sequences, num_tokens]``. Good until the next call for the layer.

        Raises:
            ValueError: Before the first `advance`.
        """
        if (new := self._newest) is None:
            raise ValueError("advance before the first step")
        if layer not in self._joined:
            self._joined[layer] = _joined(self._states[layer])
        raw, seen = self._raw[layer], self._seen[layer]
        for room, side in zip(raw, (keys, values), strict=True):
            room[new.rows[:, 0], new.positions[:, 0]] = side
        open_keys, open_values = (room[new.rows, new.group].float() for room in raw)
        mean = (open_keys * new.is_in_group).sum(1, keepdim=True) / new.is_in_group.sum(1, keepdim=True)
        filled = torch.where(new.is_in_group, open_keys, mean), open_values * new.is_in_group
        place = Place(layer=layer, num_layers=self._num_layers, num_sinks=0)
        read = self._method.read(*map(_as_heads, filled), self._joined[layer], place)
        for room, side in zip(seen, read, strict=True):
            room[new.rows, new.group] = side.unflatten(1, (len(keys), -1)).transpose(0, 1).to(room)
        num_sinks, num_tokens = self._conditions.num_sinks, new.is_there.shape[1]
        shown = []
        for old, room in zip(raw, seen, strict=True):
            room[:, :num_sinks] = old[:, :num_sinks]
            sides = old[:, :num_tokens], room[:, :num_tokens]
            shown.append(torch.where(new.is_near, *sides) if self._conditions.tail else sides[1])
        return shown[0], shown[1], new.is_there


@dataclass(frozen=True, slots=True, kw_only=True)
class _Newest:
    """Where the newest token of every sequence is, and what it sees.

    Args:
        rows: Number of each sequence, ``[num_sequences, 1]``.
        positions: Of its newest token, ``[num_sequences, 1]``.
        group: Positions of the group with it, ``[num_sequences, group_tokens]``.
        is_in_group: Which of them are there, ``[num_sequences, group_tokens, 1, 1]``.
        is_there: Which tokens are there, ``[num_sequences, num_tokens]``.
        is_near: Which tokens are in the tail, ``[num_sequences, num_tokens, 1, 1]``.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    group: torch.Tensor
    is_in_group: torch.Tensor
    is_there: torch.Tensor
    is_near: torch.Tensor


def _as_heads(groups: torch.Tensor) -> torch.Tensor:
    """``[num_sequences, num_tokens, num_heads, head_dim]`` to ``[num_tokens, all heads, head_dim]``."""
    return groups.transpose(0, 1).flatten(1, 2)


def _joined(states: Sequence[Any]) -> Any:
    """State of one layer for the heads of all sequences."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(list(states))
