"""Copies between device and host pools where there is no GPU: imported after `cpu`, in every process.

SGLang's copies are CUDA kernels, and its host memory is pinned; here the same rows are copied by index.
"""

from typing import Any

import torch
from sglang.srt.mem_cache.pool_host import base, common, mha

Pool = mha.MHATokenToKVPoolHost


def _allocate(dims: tuple[int, ...], *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return torch.zeros(dims, dtype=dtype)


def _rows(pool: Any, side: int, layer: int, indices: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The buffer of one side of the pool, and the index of tokens of one layer in it."""
    tokens = indices.to("cpu", torch.int64)
    buffer = pool.kv_buffer[side]
    if pool.layout == "layer_first":
        return buffer, (layer, tokens)
    if pool.layout == "page_first":
        return buffer, (tokens, layer)
    assert pool.layout == "page_first_direct", pool.layout
    return buffer, (tokens // pool.page_size, layer, tokens % pool.page_size)


def _load(
    self: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, *_: Any, **__: Any
) -> None:
    for side, layers in enumerate(_device_buffers(self, device_pool)):
        buffer, index = _rows(self, side, layer_id, host_indices)
        layers[layer_id][device_indices] = buffer[index]


def _backup(self: Any, device_pool: Any, host_indices: Any, device_indices: Any, *_: Any, **__: Any) -> None:
    for side, layers in enumerate(_device_buffers(self, device_pool)):
        for layer, rows in enumerate(layers):
            buffer, index = _rows(self, side, layer, host_indices)
            buffer[index] = rows[device_indices]


def _device_buffers(pool: Any, device_pool: Any) -> tuple[Any, Any]:
    if hasattr(pool, "device_k_buffers"):  # 0.5.23 knows them without the device pool
        return pool.device_k_buffers, pool.device_v_buffers
    return device_pool.k_buffer, device_pool.v_buffer


Pool.load_to_device_per_layer = _load
Pool.backup_from_device_all_layer = _backup
for _name in ("cpu", "cuda"):
    common.ALLOC_MEMORY_FUNCS[_name] = _allocate
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # of 10 GB, which not every machine has left
_init = base.HostKVCache.__init__


def _unpinned(self: Any, *arguments: Any, **named: Any) -> None:
    _init(self, *arguments, **named)
    self.pin_memory = False


base.HostKVCache.__init__ = _unpinned
