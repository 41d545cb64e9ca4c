"""TQStoreConnector: LMCache inside an engine's process on tq-store, through `remote_storage_plugins`.

LMCache wraps a connector in one that releases what it was given to store; so this one never does. What it
loads belongs to the caller, and is released here only when the caller has gone.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.exceptions import IrrecoverableException
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from tq_connectors.envelope import StoredObject
from tq_connectors.lmcache.identity import ObjectNames
from tq_connectors.lmcache.object_layout import ObjectLayout, parse_layout
from tq_connectors.lmcache.object_store import NewObject, ObjectStore
from tq_connectors.lmcache.settings import read_settings
from tq_store.client import StoreClient
from tq_store.errors import ConfigError
from tq_store.keys import BlockKey

_PREFIX = "remote_storage_plugin."
_NOT_OURS = ("module_path", "class_name")
_Answer = TypeVar("_Answer")


class TQStoreConnector(RemoteConnector):
    """LMCache's chunks as blocks of a tq-store server.

    Coroutines run on LMCache's loop and hand what blocks to threads of ours. Whatever fails is a miss.

    Args:
        loop: LMCache's loop.
        local_cpu_backend: Allocates what is loaded.
        config: LMCache's; `extra_config` holds our settings as ``remote_storage_plugin.NAME.SETTING``.
        plugin_name: NAME; by default the one plugin that names this class.
        metadata: LMCache's; by default that of `local_cpu_backend`.

    Raises:
        IrrecoverableException: A setting is missing, unknown or not allowed. Any other exception LMCache
            would take for a lost connection, and then miss for ever.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        local_cpu_backend: Any,
        config: Any,
        plugin_name: str | None = None,
        metadata: Any = None,
    ) -> None:
        metadata = metadata or getattr(local_cpu_backend, "metadata", None)
        if metadata is not None:  # a scheduler has none; it loads nothing
            super().__init__(config, metadata)
        try:
            written = _written_settings(config.extra_config or {}, plugin_name, type(self).__name__)
            settings, connection = read_settings(written, os.environ)
            self._client = StoreClient(config=connection)
        except ConfigError as error:
            raise IrrecoverableException(f"tq-store: {error}") from error
        self._names = ObjectNames(settings)
        self._store = ObjectStore(self._client)
        self._allocator = local_cpu_backend
        self._loop = loop
        self._threads = ThreadPoolExecutor(
            settings.load_threads + settings.store_threads, thread_name_prefix="tq-lmcache"
        )

    async def exists(self, key: CacheEngineKey) -> bool:
        """Whether the store has a chunk."""
        return await self._on_thread(lambda: self.exists_sync(key), abandoned=_ignore)

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """The same for callers that may wait."""
        return self.batched_contains([key]) == 1

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        """A chunk, which then belongs to the caller, or None."""
        (found,) = await self.batched_get([key])
        return found

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """Store a chunk; its memory is read until this returns."""
        await self.batched_put([key], [memory_obj])

    async def list(self) -> list[str]:
        """Nothing: the store's keys are digests."""
        return []

    async def close(self) -> None:
        """Cut the connection, and wait until no thread touches LMCache's memory."""
        self._client.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def support_ping(self) -> bool:
        """Yes."""
        return True

    async def ping(self) -> int:
        """0 where the store answers, which is what LMCache takes for healthy."""
        return 0 if await self._on_thread(self._store.ping, abandoned=_ignore) else 1

    def support_batched_get(self) -> bool:
        """Yes."""
        return True

    async def batched_get(self, keys: Sequence[CacheEngineKey]) -> Sequence[MemoryObj | None]:
        """Chunks by position, None for a miss."""
        return await self._on_thread(lambda: self._load(keys), abandoned=_release)

    def support_batched_put(self) -> bool:
        """Yes."""
        return True

    async def batched_put(self, keys: Sequence[CacheEngineKey], memory_objs: Sequence[MemoryObj]) -> None:
        """Store chunks in one call; their memory is read until this returns."""
        await self._on_thread(lambda: self._save(keys, memory_objs))

    def support_batched_contains(self) -> bool:
        """Yes."""
        return True

    def batched_contains(self, keys: Sequence[CacheEngineKey]) -> int:
        """How many chunks, from the first on, the store has without a gap."""
        answers = self._store.contains([self._block_key(key) for key in keys]) or [False]
        return [*answers, False].index(False)

    def support_batched_async_contains(self) -> bool:
        """Yes."""
        return True

    async def batched_async_contains(
        self, lookup_id: str, keys: Sequence[CacheEngineKey], pin: bool = False
    ) -> int:
        """The same without waiting; the store has nothing to pin."""
        return await self._on_thread(lambda: self.batched_contains(keys), abandoned=_ignore)

    def support_batched_get_non_blocking(self) -> bool:
        """Yes."""
        return True

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: Sequence[CacheEngineKey]
    ) -> Sequence[MemoryObj]:
        """Chunks from the first on, without a gap; what came after a gap is released."""
        found = await self.batched_get(keys)
        num_leading = [*found, None].index(None)
        _release(found[num_leading:])
        return [chunk for chunk in found[:num_leading] if chunk is not None]

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Remove a chunk; True where one was there."""
        return self._store.delete([self._block_key(key)])[0]

    def _block_key(self, key: CacheEngineKey) -> BlockKey:
        return self._names.key(key.model_name, "in-process", "", key.to_string().encode())

    def _save(self, keys: Sequence[CacheEngineKey], chunks: Sequence[MemoryObj]) -> None:
        self._store.put(
            [
                NewObject(
                    self._block_key(key), _layout_of(chunk).text(), memoryview(chunk.byte_array).cast("B")
                )
                for key, chunk in zip(keys, chunks, strict=True)
            ]
        )

    def _load(self, keys: Sequence[CacheEngineKey]) -> Sequence[MemoryObj | None]:
        chunks: dict[int, MemoryObj | None] = {}
        for position, found in self._store.get([self._block_key(key) for key in keys]):
            chunks[position] = self._allocate(found)
        return [chunks.get(position) for position in range(len(keys))]

    def _allocate(self, found: StoredObject) -> MemoryObj | None:
        """LMCache's memory with an object in it; None where that does not fit or is not to be had."""
        try:
            layout = parse_layout(found.layout)
            kind = MemoryFormat[layout.format]
        except (ValueError, KeyError) as error:
            self._store.reject(str(error))
            return None
        if layout.num_bytes != len(found.data):
            self._store.reject(f"{found.layout} does not take {len(found.data)} bytes")
            return None
        shapes = [torch.Size(shape) for shape in layout.shapes]
        chunk = self._allocator.allocate(shapes, list(layout.dtypes), kind, busy_loop=False)
        if chunk is None:
            return None
        memoryview(chunk.byte_array).cast("B")[:] = found.data
        return chunk

    async def _on_thread(
        self, work: Callable[[], _Answer], *, abandoned: Callable[[_Answer], None] | None = None
    ) -> _Answer:
        """Answer of `work`, run on a thread.

        If the caller gives up, `abandoned` gets the answer when it is there; without one, this waits for it,
        because `work` reads memory that the caller would release.
        """
        task = self._loop.run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if abandoned is None:
                await asyncio.wait([task])
            else:
                task.add_done_callback(lambda done: abandoned(done.result()))
            raise


class TQStoreConnectorAdapter(ConnectorAdapter):
    """Makes connectors for plugins whose names begin with `tq`; several of them may have several stores."""

    def __init__(self) -> None:
        super().__init__("plugin://tq")

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """The connector of one plugin."""
        return TQStoreConnector(
            context.loop, context.local_cpu_backend, context.config, context.plugin_name, context.metadata
        )


def _written_settings(extra: Mapping[str, Any], plugin_name: str | None, class_name: str) -> dict[str, Any]:
    """Our settings of one plugin.

    Raises:
        ConfigError: No name was given, and not exactly one plugin is of our class.
    """
    if plugin_name is None:
        names = [
            setting.removeprefix(_PREFIX).removesuffix(".class_name")
            for setting, value in extra.items()
            if setting.startswith(_PREFIX) and setting.endswith(".class_name") and value == class_name
        ]
        if len(names) != 1:
            raise ConfigError(
                f"{len(names)} plugins have the class {class_name}; for several write TQStoreConnectorAdapter"
            )
        plugin_name = names[0]
    start = f"{_PREFIX}{plugin_name}."
    written = {name.removeprefix(start): value for name, value in extra.items() if name.startswith(start)}
    return {name: value for name, value in written.items() if name not in _NOT_OURS}


def _layout_of(chunk: MemoryObj) -> ObjectLayout:
    shapes = tuple(tuple(shape) for shape in chunk.get_shapes())
    return ObjectLayout(chunk.get_memory_format().name, shapes, tuple(chunk.get_dtypes()))


def _ignore(answer: object) -> None:
    pass


def _release(chunks: Sequence[MemoryObj | None]) -> None:
    for chunk in chunks:
        if chunk is not None:
            chunk.ref_count_down()
