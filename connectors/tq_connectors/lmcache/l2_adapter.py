"""TQStoreL2Adapter: LMCache's multi-process server on tq-store, as its `plugin` L2 adapter.

LMCache imports this module because its JSON names it, and builds a serde right after that. So importing it
registers the serde too: the one side effect of an import in this project, and the only way in that needs no
launcher of ours.
"""

import bisect
import os
import sys
from collections.abc import Mapping
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from tq_connectors.lmcache.identity import ObjectNames
from tq_connectors.lmcache.key_index import KeyIndex
from tq_connectors.lmcache.object_layout import describe
from tq_connectors.lmcache.object_store import NewObject, ObjectStore
from tq_connectors.lmcache.serde import register_serde
from tq_connectors.lmcache.settings import read_settings
from tq_connectors.task_queue import TaskQueue
from tq_store.client import StoreClient
from tq_store.keys import BlockKey

register_serde()


class TQStoreL2Adapter(L2AdapterInterface):
    """LMCache's objects as blocks of a tq-store server.

    Calls come from LMCache's controller threads and never wait: threads of ours talk to the store. Whatever
    fails there is a miss. An object is served only when its checksums, its key and its layout are right.

    Args:
        params: The `adapter_params` of the JSON; `StoreSettings` and the client's settings.
        l1_memory_desc: Where LMCache's memory lies; not needed.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed; LMCache then does not start.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        settings, connection = read_settings(params, os.environ)
        super().__init__(max_capacity_bytes=settings.capacity_bytes)
        self._deletion_timeout_s = connection.admin_timeout_s
        self._names = ObjectNames(settings)
        self._client = StoreClient(config=connection)
        self._store = ObjectStore(self._client)
        self._index: KeyIndex[ObjectKey] = KeyIndex()
        self._store_event, self._lookup_event, self._load_event = (create_event_notifier() for _ in range(3))
        pending = settings.max_pending_tasks
        self._stores: TaskQueue[L2StoreResult] = TaskQueue(
            "store",
            num_threads=settings.store_threads,
            max_pending=pending,
            announce=self._store_event.notify,
        )
        self._lookups: TaskQueue[Bitmap] = TaskQueue(
            "lookup", num_threads=1, max_pending=pending, announce=self._lookup_event.notify
        )
        self._loads: TaskQueue[Bitmap] = TaskQueue(
            "load", num_threads=settings.load_threads, max_pending=pending, announce=self._load_event.notify
        )
        # never full: a deletion that is dropped would keep its objects from readers for good
        self._deletions: TaskQueue[bool] = TaskQueue(
            "delete", num_threads=1, max_pending=sys.maxsize, announce=lambda: None
        )

    def get_store_event_fd(self) -> int:
        """Signalled when a store is done."""
        return int(self._store_event.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Signalled when a lookup is done."""
        return int(self._lookup_event.fileno())

    def get_load_event_fd(self) -> int:
        """Signalled when a load is done."""
        return int(self._load_event.fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store objects; their memory is read until the task is done."""
        return self._stores.submit(lambda: self._put(keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Results of the stores that are done, each once; a store succeeds when all of its objects do."""
        return self._stores.take_all()

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Look objects up, and hold those that are there until `submit_unlock`."""
        return self._lookups.submit(lambda: self._find(keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which objects a lookup found, once."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Hold objects once less. Locks are ours, not the store's, so this cannot fail."""
        self._delete(self._index.unlock(keys))

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Fill objects; their memory is written until the task is done."""
        return self._loads.submit(lambda: self._get(keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which objects a load filled, once."""
        return self._loads.take(task_id)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Remove objects: at once for readers, from the store soon, and a locked one with its last unlock."""
        self._delete(keys)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Objects that this process knows to be in the store, a page at a time.

        Raises:
            ValueError: `page_size` is not positive, or `cursor` is none of ours.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        if cursor is not None and cursor.count("@") < 4:
            raise ValueError(f"{cursor!r} is no cursor of this adapter")
        rows = sorted((_position(key), key, size) for key, size in self._index.known())
        rows = [row for row in rows if model_name in (None, row[1].model_name)]
        first = 0 if cursor is None else bisect.bisect_right(rows, cursor, key=lambda row: row[0])
        page = rows[first : first + page_size]
        entries = tuple(KeyEntry(key=key.to_encoded_object_key(), size_bytes=size) for _, key, size in page)
        is_last = first + page_size >= len(rows)
        return KeyListPage(entries=entries, next_page_token=None if is_last else page[-1][0])

    def get_memory_tags(self) -> Any:
        """Storage that other hosts share; LMCache asks since 0.5.7, which has the words for it."""
        from lmcache.v1.distributed.api import MemoryResidency, MemorySegment, MemoryTags

        return MemoryTags(MemorySegment.STORAGE, MemoryResidency.REMOTE)

    def report_status(self) -> dict[str, Any]:
        """Health and counters; asks nobody."""
        queues = {
            "stores": self._stores,
            "lookups": self._lookups,
            "loads": self._loads,
            "deletions": self._deletions,
        }
        usage = self.get_usage()
        return {
            "is_healthy": self._store.is_reachable,
            "type": type(self).__name__,
            "address": self._client.address,
            "stored_object_count": self._index.num_objects,
            "locked_key_count": self._index.num_locked,
            "used_bytes": usage.total_bytes_used,
            "max_capacity_bytes": usage.total_capacity_bytes,
            **{f"pending_{name}": queue.pending_tasks for name, queue in queues.items()},
            **{f"refused_{name}": queue.refused_tasks for name, queue in queues.items()},
            **self._store.counters,
        }

    def close(self) -> None:
        """Cut the connection, wait until no thread touches LMCache's memory, and release everything."""
        self._client.close()
        for queue in (self._lookups, self._loads, self._stores, self._deletions):
            queue.close()
        for event in (self._store_event, self._lookup_event, self._load_event):
            event.close()

    def _block_key(self, key: ObjectKey) -> BlockKey:
        part = f"rank {key.kv_rank:08x} group {key.object_group_id}"
        return self._names.key(key.model_name, part, key.cache_salt, key.chunk_hash)

    def _put(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2StoreResult:
        self._index.wait_for_deletions(keys, self._deletion_timeout_s)
        stored = self._store.put(
            [
                NewObject(self._block_key(key), _layout_of(item), memoryview(item.byte_array).cast("B"))
                for key, item in zip(keys, objects, strict=True)
            ]
        )
        sizes = {key: item.get_size() for key, item, done in zip(keys, objects, stored, strict=True) if done}
        self._note_stored(sizes)
        return L2StoreResult(all(stored), sum(sizes.values()))

    def _find(self, keys: list[ObjectKey]) -> Bitmap:
        self._index.lock(keys)
        # asked before the store is, whose answer may come before a deletion and be read after it; what is
        # locked by now begins no deletion
        is_leaving = [self._index.is_leaving(key) for key in keys]
        answers = self._store.contains([self._block_key(key) for key in keys])
        is_there = answers or [False] * len(keys)
        hits = [there and not leaving for there, leaving in zip(is_there, is_leaving, strict=True)]
        self._delete(self._index.unlock([key for key, hit in zip(keys, hits, strict=True) if not hit]))
        if answers is not None:
            self._note_gone([key for key, there in zip(keys, is_there, strict=True) if not there])
        return _bitmap(hits)

    def _get(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> Bitmap:
        is_filled = [False] * len(keys)
        is_leaving = [self._index.is_leaving(key) for key in keys]
        for position, found in self._store.get([self._block_key(key) for key in keys]):
            target = objects[position]
            memory = memoryview(target.byte_array).cast("B")
            if found.layout != _layout_of(target) or len(found.data) != len(memory):
                self._store.reject(f"it is {found.layout}, asked for was {_layout_of(target)}")
            elif not is_leaving[position]:
                memory[:] = found.data
                is_filled[position] = True
        filled = {
            key: item.get_size() for key, item, done in zip(keys, objects, is_filled, strict=True) if done
        }
        self._note_stored(filled)
        if filled:
            self._notify_keys_accessed(list(filled))
        return _bitmap(is_filled)

    def _delete(self, keys: list[ObjectKey]) -> None:
        leaving, known = self._index.begin_deletion(keys)
        self._notify_gone(known)
        if leaving:
            self._deletions.submit(lambda: self._delete_now(leaving), False)
        self._deletions.take_all()

    def _delete_now(self, keys: list[ObjectKey]) -> bool:
        try:
            self._store.delete([self._block_key(key) for key in keys])
        finally:
            self._index.end_deletion(keys)
        return True

    def _note_stored(self, sizes: dict[ObjectKey, int]) -> None:
        """Count objects that were not known, be they new or left by another process."""
        new = {key: size for key, size in sizes.items() if self._index.add(key, size)}
        if new:
            self._notify_keys_stored(list(new), list(new.values()))

    def _note_gone(self, keys: list[ObjectKey]) -> None:
        """Stop counting objects that the store has dropped by itself."""
        self._notify_gone(self._index.forget(keys))

    def _notify_gone(self, known: list[tuple[ObjectKey, int]]) -> None:
        if known:
            self._notify_keys_deleted([key for key, _ in known], [size for _, size in known])


def _layout_of(item: MemoryObj) -> str:
    meta = item.meta
    shapes, dtypes = meta.shapes or [meta.shape], meta.dtypes or [meta.dtype]
    return describe(shapes, dtypes)


def _position(key: ObjectKey) -> str:
    parts = (key.model_name, f"{key.kv_rank:08x}", str(key.object_group_id), key.chunk_hash.hex())
    return "@".join((*parts, key.cache_salt))


def _bitmap(flags: list[bool]) -> Bitmap:
    bitmap = Bitmap(len(flags))
    for position, flag in enumerate(flags):
        if flag:
            bitmap.set(position)
    return bitmap
