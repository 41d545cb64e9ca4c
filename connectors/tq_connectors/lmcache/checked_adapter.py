"""CheckedL2Adapter: any L2 adapter of LMCache's, with chunks of our serde verified one by one.

LMCache's wrapper of a serde fails a whole task when one chunk does not unpack. Here a damaged chunk is a miss
before the serde sees it, and the others stay hits.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.memory_management import MemoryObj

from tq_connectors.lmcache.serde import owner_of, register_serde
from tq_store.block import verify_block
from tq_store.errors import BlockFormatError, ConfigError

logger = logging.getLogger(__name__)

register_serde()


class CheckedL2Adapter(L2AdapterInterface):
    """Passes everything on to an inner adapter, and serves what it loads only when it is sound.

    The adapter must have the serde `tq` (with preset `none` for pages that are compressed already): what has
    no header of ours is a miss. Loads are verified on the thread that asks for their result, LMCache's serde
    thread, at the speed of memory.

    Args:
        params: ``{"inner": {"type": ..., ...}}``, the JSON of the inner adapter.
        l1_memory_desc: Handed on.

    Raises:
        ConfigError: There is no inner adapter in `params`, or something else is.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        inner = params.get("inner")
        if set(params) != {"inner"} or not isinstance(inner, dict) or not isinstance(inner.get("type"), str):
            raise ConfigError('a checked adapter is written as {"inner": {"type": ..., ...}}, nothing else')
        config = get_l2_adapter_config_class(inner["type"]).from_dict(inner)
        self._inner: L2AdapterInterface = create_l2_adapter_from_registry(config, l1_memory_desc)
        self._lock = threading.Lock()
        self._loads: dict[int, tuple[list[ObjectKey], list[MemoryObj]]] = {}
        self._rejected_chunks = 0

    def get_store_event_fd(self) -> int:
        """That of the inner adapter."""
        return int(self._inner.get_store_event_fd())

    def get_lookup_and_lock_event_fd(self) -> int:
        """That of the inner adapter."""
        return int(self._inner.get_lookup_and_lock_event_fd())

    def get_load_event_fd(self) -> int:
        """That of the inner adapter."""
        return int(self._inner.get_load_event_fd())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store through the inner adapter."""
        return int(self._inner.submit_store_task(keys, objects))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Results of the inner adapter."""
        return dict(self._inner.pop_completed_store_tasks())

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Look up in the inner adapter."""
        return int(self._inner.submit_lookup_and_lock_task(keys, group_layout_descs))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """What the inner adapter found."""
        return self._inner.query_lookup_and_lock_result(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Unlock in the inner adapter."""
        self._inner.submit_unlock(keys)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Load through the inner adapter, and remember what to verify."""
        with self._lock:  # held over the call, because the load may be done before it returns
            task_id = int(self._inner.submit_load_task(keys, objects))
            self._loads[task_id] = (keys, objects)
        return task_id

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which objects the inner adapter filled with sound chunks, once."""
        loaded = self._inner.query_load_result(task_id)
        if loaded is None:
            return None
        with self._lock:
            keys, objects = self._loads.pop(task_id, ([], []))
        for position, (key, item) in enumerate(zip(keys, objects, strict=True)):
            if loaded.test(position) and not self._is_sound(key, item):
                loaded.clear(position)
        return loaded

    def register_listener(self, listener: L2AdapterListener) -> None:
        """The inner adapter tells it what is stored."""
        self._inner.register_listener(listener)

    def set_backend_identity(self, name: str, shared: bool = False) -> None:
        """The inner adapter's events bear it."""
        self._inner.set_backend_identity(name, shared)

    @property
    def supports_global_eviction(self) -> bool:
        """Whether the inner adapter does."""
        return bool(self._inner.supports_global_eviction)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete from the inner adapter."""
        self._inner.delete(keys)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Keys of the inner adapter."""
        return self._inner.list_l2_keys(model_name=model_name, page_size=page_size, cursor=cursor)

    def get_usage(self) -> AdapterUsage:
        """Usage of the inner adapter."""
        return self._inner.get_usage()

    def get_memory_tags(self) -> Any:
        """Those of the inner adapter; LMCache asks since 0.5.7."""
        return self._inner.get_memory_tags()

    def report_status(self) -> dict[str, Any]:
        """Status of the inner adapter, and how many chunks were not sound."""
        return {**self._inner.report_status(), "rejected_chunks": self._rejected_chunks}

    def close(self) -> None:
        """Close the inner adapter."""
        self._inner.close()

    def _is_sound(self, key: ObjectKey, item: MemoryObj) -> bool:
        try:
            verify_block(memoryview(item.byte_array).cast("B"), owner_of(key))
        except BlockFormatError as error:
            self._rejected_chunks += 1
            logger.warning("a chunk is a miss: %s", error)
            return False
        return True
