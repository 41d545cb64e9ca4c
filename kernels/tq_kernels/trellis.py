"""Dependent quantization with eight states: the path of whole levels that is nearest to a vector.

A vector is walked channel by channel in one of eight states. Bit 0 of the state is the grid of the channel:
on grid g, index k stands for level 2 k + g. The parity of k says which state follows. So all levels together
are twice as dense as the levels that an index tells apart, and an index costs the bits of the coarser grid.

The states are those of Ungerboeck's eight-state code (parity checks 13 and 04 in octal): two paths that part
have a squared distance of 10 levels or more. A vector starts in state 0 and may end in any.

The search minimises squared error alone. Bits of a Gaussian coordinate grow with the square of its level, so
a price on bits would only stretch the step, which the rate decides anyway (no gain at 1.5 to 4 bits).
"""

import torch

NUM_STATES = 8
LARGEST_LEVEL = 126
"""In size, so that levels and indices are bytes."""

_PARITY_CHECKS = (0o13, 0o04)
_CHUNK_COORDINATES = 1 << 18
"""Coordinates searched at once; bounds memory to some 20 MiB."""


def _next_state(state: int, parity: int) -> int:
    """One clock of the systematic feedback encoder in observer form."""
    grid = state & 1
    bits = [
        _PARITY_CHECKS[0] >> i & grid ^ _PARITY_CHECKS[1] >> i & parity ^ state >> i & 1 for i in (1, 2, 3)
    ]
    return sum(bit << i for i, bit in enumerate(bits))


NEXT_STATE = tuple((_next_state(state, 0), _next_state(state, 1)) for state in range(NUM_STATES))
"""The state that follows, by state and parity of the index."""

_WAYS = [
    [
        (state, parity)
        for state in range(NUM_STATES)
        for parity in (0, 1)
        if NEXT_STATE[state][parity] == target
    ]
    for target in range(NUM_STATES)
]
"""The two ways into every state."""


def nearest_levels(vectors: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Levels of the path nearest to each vector.

    Args:
        vectors: ``[n, d]`` float32, finite, in units of a level.
        limits: ``[n]`` float32, size that no level may exceed: from 4 to `LARGEST_LEVEL`.

    Returns:
        ``[n, d]`` int8.
    """
    rows = max(1, _CHUNK_COORDINATES // vectors.shape[1])
    levels = torch.empty(vectors.shape, dtype=torch.int8, device=vectors.device)
    for i in range(0, vectors.shape[0], rows):
        # a class has a level every 4, so the nearest is never more than 2 away
        bound = (limits[i : i + rows, None] - 2).clamp_min(2)
        levels[i : i + rows] = _search(vectors[i : i + rows].minimum(bound).maximum(-bound).T).T
    return levels


def _search(coordinates: torch.Tensor) -> torch.Tensor:
    """Viterbi's algorithm over ``[d, n]``."""
    num_channels, n = coordinates.shape
    device = coordinates.device
    # levels that are c modulo 4 have grid c mod 2 and an index of parity c div 2
    classes = torch.arange(4, dtype=torch.float32, device=device)[:, None]
    nearest = torch.round((coordinates[:, None] - classes) / 4).mul_(4).add_(classes)
    errors = (coordinates[:, None] - nearest).square_()
    ways = torch.tensor(_WAYS, device=device)
    sources = ways[..., 0]
    kinds = (sources & 1) + 2 * ways[..., 1]
    costs = torch.full((NUM_STATES, n), torch.inf, device=device)
    costs[0] = 0
    second = torch.empty((num_channels, NUM_STATES, n), dtype=torch.bool, device=device)
    for channel in range(num_channels):
        one, other = (costs[sources[:, i]].add_(errors[channel, kinds[:, i]]) for i in (0, 1))
        torch.lt(other, one, out=second[channel])
        costs = torch.minimum(one, other)
    state = costs.argmin(0)
    levels = torch.empty((num_channels, n), dtype=torch.int8, device=device)
    for channel in reversed(range(num_channels)):
        way = second[channel].gather(0, state[None])[0].long()
        levels[channel] = nearest[channel].gather(0, kinds[state, way][None])[0].to(torch.int8)
        state = sources[state, way]
    return levels
