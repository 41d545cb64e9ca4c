"""LMCache's memory objects around tensors, for what measures and tests its serdes and adapters."""

import torch
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj


def memory_object(tensor: torch.Tensor) -> TensorMemoryObj:
    """An object as LMCache's allocator makes it, with a copy of the tensor's numbers.

    Where there is a GPU, LMCache's memory on the host is pinned.
    """
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    raw = raw.pin_memory() if torch.cuda.is_available() and not raw.is_cuda else raw.clone()
    metadata = MemoryObjMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        address=0,
        phy_size=raw.numel(),
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
        shapes=[tensor.shape],
        dtypes=[tensor.dtype],
    )
    return TensorMemoryObj(raw, metadata, parent_allocator=None)
