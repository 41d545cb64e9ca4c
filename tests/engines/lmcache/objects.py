"""LMCache's memory objects and keys, and its adapters as its controllers use them."""

import select
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig
from lmcache.v1.distributed.l1_manager import L1Manager
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor
from lmcache.v1.platform import consume_fd

from benchmarks.lmcache_objects import memory_object

WAIT_S = 30.0
PLUGIN = {
    "type": "plugin",
    "module_path": "tq_connectors.lmcache.l2_adapter",
    "class_name": "TQStoreL2Adapter",
}
CHECKED = {
    "type": "plugin",
    "module_path": "tq_connectors.lmcache.checked_adapter",
    "class_name": "CheckedL2Adapter",
}


def plugin(address: str, **settings: Any) -> dict[str, Any]:
    """The JSON of our adapter."""
    written = {"address": address, "revision": "r", "kv_dtype": "bfloat16", "codec": "none"} | settings
    return PLUGIN | {"adapter_params": written}


def checked(**inner: Any) -> dict[str, Any]:
    """The JSON of an adapter of LMCache's in our checked one."""
    return CHECKED | {"adapter_params": {"inner": inner}}


def object_key(number: int, *, salt: str = "", model: str = "org/model") -> ObjectKey:
    return ObjectKey(
        chunk_hash=number.to_bytes(32, "big"), model_name=model, kv_rank=0x01000100, cache_salt=salt
    )


def make_adapter(spec: dict[str, Any]) -> L2AdapterInterface:
    """An adapter from its JSON, with the serde that the JSON names, as LMCache builds it at its start."""
    config = get_l2_adapter_config_class(spec["type"]).from_dict(spec)
    adapter = create_l2_adapter_from_registry(config, None)
    if "serde" not in spec:
        return adapter
    written = dict(spec["serde"])
    serde = create_serde_processor(SerdeConfig(type=written.pop("type"), kwargs=written))
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
    return SerdeL2AdapterWrapper(adapter, serde, L1Manager(L1ManagerConfig(memory_config=memory)))


class Controller:
    """Calls an adapter as LMCache's controllers do: submit, wait for the event, ask once."""

    def __init__(self, adapter: L2AdapterInterface) -> None:
        self.adapter = adapter

    def store(self, keys: Sequence[ObjectKey], tensors: Sequence[torch.Tensor]) -> bool:
        objects = [memory_object(tensor) for tensor in tensors]
        task = self.adapter.submit_store_task(list(keys), objects)
        done: dict[int, Any] = {}
        while task not in done:
            _wait_for(self.adapter.get_store_event_fd())
            done |= self.adapter.pop_completed_store_tasks()
        return bool(done[task].is_successful())

    def find(self, keys: Sequence[ObjectKey]) -> list[bool]:
        layouts = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}
        task = self.adapter.submit_lookup_and_lock_task(list(keys), layouts)
        return self._flags(
            task,
            self.adapter.get_lookup_and_lock_event_fd(),
            self.adapter.query_lookup_and_lock_result,
            len(keys),
        )

    def load(self, keys: Sequence[ObjectKey], like: torch.Tensor) -> list[torch.Tensor | None]:
        """Loaded tensors of that shape and dtype, None for a miss."""
        objects = [memory_object(torch.zeros_like(like)) for _ in keys]
        task = self.adapter.submit_load_task(list(keys), objects)
        flags = self._flags(task, self.adapter.get_load_event_fd(), self.adapter.query_load_result, len(keys))
        return [item.tensor if flag else None for item, flag in zip(objects, flags, strict=True)]

    def _flags(self, task: int, event: int, query: Any, count: int) -> list[bool]:
        while (bitmap := query(task)) is None:
            _wait_for(event)
        return [bitmap.test(position) for position in range(count)]


def _wait_for(event: int) -> None:
    poller = select.poll()
    poller.register(event, select.POLLIN)
    assert poller.poll(WAIT_S * 1000), "the adapter never answered"
    consume_fd(event)
