"""One codec state for the ranks that hold parts of the same pages: the first rank's."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from tq_connectors.codec_state import CodecState


def of_first_rank(
    fetch: Callable[[], CodecState | None], group: dist.ProcessGroup | None
) -> CodecState | None:
    """What the first rank of a group comes by, on all of them, which make this call together.

    Each for itself could come by another state, or by none, and no page would have all of its parts.

    Args:
        fetch: Comes by a state, or by none; called on the first rank.
        group: The ranks, on their CPUs; None for a process that is alone.
    """
    if group is None or dist.get_world_size(group) == 1:
        return fetch()
    state = fetch() if dist.get_rank(group) == 0 else None
    shape = torch.tensor((0, 0, 0) if state is None else state.key_balance.shape)
    dist.broadcast(shape, group=group, group_src=0)
    if not shape.any():
        return None
    balance = torch.empty(shape.tolist()) if state is None else state.key_balance
    dist.broadcast(balance, group=group, group_src=0)
    return CodecState(balance)
