"""Many small copies of tensors at once, beside a scheduler that never rests."""

from collections.abc import Sequence

import torch


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors to others of their shape and dtype.

    In an engine whose scheduler never rests, each call of torch costs us its wait for the interpreter's lock.
    So a device gets all copies in one call. In host memory numpy does them, as torch would share each of
    these small copies out to all cores, and wait for the last of them.
    """
    if not targets:
        return
    if targets[0].device.type == sources[0].device.type == "cpu":
        for target, source in zip(targets, sources, strict=True):
            target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        torch._foreach_copy_([*targets], [*sources], non_blocking=True)
