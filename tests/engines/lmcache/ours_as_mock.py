"""A pytest plugin for LMCache's own tests: where they make its mock adapter, they get ours on a real server.

LMCache tests the contract of its L2 adapters, and the controllers that use them, on its mock.
"""

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from lmcache import torch_dev
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import mock_l2_adapter
from store.running_server import running_server

from tq_connectors.lmcache.l2_adapter import TQStoreL2Adapter

_addresses: list[str] = []


class MockL2Adapter(TQStoreL2Adapter):
    """Ours with what is the mock's own: it starts empty, may be slow, and tells tests what it holds."""

    def __init__(self, config: mock_l2_adapter.MockL2AdapterConfig) -> None:
        self._bytes_per_s = config.mock_bandwidth_gb * (1 << 30)
        super().__init__(
            {
                "address": _addresses[0],
                "revision": "1",
                "kv_dtype": "bfloat16",
                "codec": "none",
                "salt": uuid.uuid4().hex,
                "capacity": int(config.max_size_gb * (1 << 30)),
            }
        )

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


mock_l2_adapter.MockL2Adapter = MockL2Adapter
# tests of the controllers skip themselves without a GPU, though nothing in them needs one
type(torch_dev).is_available = lambda self: True


@pytest.fixture(autouse=True, scope="session")
def tq_store_server() -> Iterator[Any]:
    with running_server() as server:
        _addresses.append(server.address)
        yield server
