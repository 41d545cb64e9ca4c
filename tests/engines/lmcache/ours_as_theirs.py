"""A pytest plugin for LMCache's own tests: where they make an adapter of its own, they get ours on a server.

LMCache tests the contract of its L2 adapters, and the controllers that use them, on its mock; what it asks of
adapters for Redis and for files besides, on those.
"""

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lmcache import torch_dev
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import fs_l2_adapter, mock_l2_adapter, native_connector_l2_adapter
from store.running_server import running_server

from benchmarks.lmcache_objects import memory_object
from tq_connectors.lmcache.l2_adapter import TQStoreL2Adapter

_addresses: list[str] = []


class _Ours(TQStoreL2Adapter):
    """Ours, which starts empty."""

    def __init__(self, capacity_gb: float = 0) -> None:
        super().__init__(
            {
                "address": _addresses[0],
                "revision": "1",
                "kv_dtype": "bfloat16",
                "codec": "none",
                "salt": uuid.uuid4().hex,
                "capacity": int(capacity_gb * (1 << 30)),
            }
        )


class MockL2Adapter(_Ours):
    """Ours with what is the mock's own: it may be slow, and tells tests what it holds."""

    def __init__(self, config: mock_l2_adapter.MockL2AdapterConfig) -> None:
        self._bytes_per_s = config.mock_bandwidth_gb * (1 << 30)
        super().__init__(config.max_size_gb)

    def _put(self, keys: list[ObjectKey], objects: list[Any]) -> Any:
        self._be_slow(objects)
        return super()._put(keys, objects)

    def _get(self, keys: list[ObjectKey], objects: list[Any]) -> Any:
        self._be_slow(objects)
        return super()._get(keys, objects)

    def _be_slow(self, objects: list[Any]) -> None:
        threading.Event().wait(sum(item.get_size() for item in objects) / self._bytes_per_s)

    def debug_get_stored_object_count(self) -> int:
        return self._index.num_objects

    def debug_get_locked_key_count(self) -> int:
        return self._index.num_locked

    def debug_has_key(self, key: ObjectKey) -> bool:
        answers = self._store.contains([self._block_key(key)])
        return answers == [True] and not self._index.is_leaving(key)


class NativeConnectorL2Adapter(_Ours):
    """Ours in place of the one around a client in C++, which it has no use for."""

    def __init__(self, client: Any, max_capacity_gb: float = 0) -> None:
        client.close()
        super().__init__(max_capacity_gb)


class FSL2Adapter(_Ours):
    """Ours in place of the one for files, whose tests store things with bytes and no layout."""

    def __init__(self, config: fs_l2_adapter.FSL2AdapterConfig) -> None:
        super().__init__()

    def submit_store_task(self, keys: list[ObjectKey], objects: list[Any]) -> int:
        return super().submit_store_task(keys, [_object_of(item) for item in objects])

    def submit_load_task(self, keys: list[ObjectKey], objects: list[Any]) -> int:
        return super().submit_load_task(keys, [_object_of(item) for item in objects])


def _object_of(item: Any) -> Any:
    return memory_object(torch.frombuffer(item.byte_array, dtype=torch.uint8))


mock_l2_adapter.MockL2Adapter = MockL2Adapter
native_connector_l2_adapter.NativeConnectorL2Adapter = NativeConnectorL2Adapter
fs_l2_adapter.FSL2Adapter = FSL2Adapter
# tests of the controllers skip themselves without a GPU, though nothing in them needs one
type(torch_dev).is_available = lambda self: True


@pytest.fixture(autouse=True, scope="session")
def tq_store_server() -> Iterator[Any]:
    with running_server() as server:
        _addresses.append(server.address)
        yield server
