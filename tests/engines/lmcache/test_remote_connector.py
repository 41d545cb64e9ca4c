"""LMCache inside an engine's process: its own wrapper, storage backend and engine on our connector."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.lmcache.engine_process import CHUNK, DIM, HEADS, LAYERS
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.exceptions import IrrecoverableException
from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import LocalCPUBackend
from lmcache.v1.storage_backend.connector import CreateConnector
from store.running_server import running_server

MODULE = "tq_connectors.lmcache.remote_connector"
SHAPE = torch.Size((2, LAYERS, CHUNK, HEADS * DIM))
METADATA = LMCacheMetadata(
    model_name="org/model",
    world_size=1,
    local_world_size=1,
    worker_id=0,
    local_worker_id=0,
    kv_dtype=torch.bfloat16,
    kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM),
    chunk_size=CHUNK,
)


def written(
    address: str, salt: str, *, name: str = "tq", class_name: str = "TQStoreConnectorAdapter", **more: Any
):
    start = f"remote_storage_plugin.{name}."
    settings = {
        "address": address,
        "revision": "r",
        "kv_dtype": "bfloat16",
        "codec": "none",
        "salt": salt,
    } | more
    return {
        "remote_storage_plugins": [name],
        "extra_config": {start + "module_path": MODULE, start + "class_name": class_name}
        | {start + key: value for key, value in settings.items()},
    }


class Connection:
    """LMCache's wrapped connector, its loop and its allocator."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        config = LMCacheEngineConfig.from_dict({"chunk_size": CHUNK, "max_local_cpu_size": 0.1, **settings})
        allocator = MixedMemoryAllocator(64 << 20)
        self.memory = LocalCPUBackend(config, METADATA, dst_device="cpu", memory_allocator=allocator)
        (name,) = settings["remote_storage_plugins"]
        try:
            self.connector = CreateConnector(
                f"plugin://{name}", self.loop, self.memory, config, METADATA, plugin_name=name
            )
        except BaseException:
            self._end()
            raise

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def chunk(self, number: int, shape: torch.Size = SHAPE) -> MemoryObj:
        chunk = self.memory.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
        chunk.tensor.fill_(number)
        return chunk

    def close(self) -> None:
        self.do(self.connector.close())
        self._end()

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def key(number: int) -> CacheEngineKey:
    return CacheEngineKey("org/model", 1, 0, number, torch.bfloat16)


KEYS = [key(number) for number in range(4)]


@pytest.fixture(params=["TQStoreConnectorAdapter", "TQStoreConnector"])
def connection(request, server, salt, client):
    opened = Connection(written(server.address, salt, class_name=request.param))
    yield opened
    opened.close()


def test_chunks_go_and_come_one_by_one_and_nobody_releases_them_twice(connection):
    chunk = connection.chunk(5)
    chunk.ref_count_up()  # the wrapper releases it once
    connection.do(connection.connector.put(KEYS[0], chunk))
    assert chunk.get_ref_count() == 1
    found = connection.do(connection.connector.get(KEYS[0]))
    assert (found.get_ref_count(), found.get_memory_format()) == (1, MemoryFormat.KV_2LTD)
    assert found.get_shapes() == [SHAPE]
    assert torch.equal(found.tensor, chunk.tensor)
    assert connection.do(connection.connector.get(KEYS[1])) is None


def test_chunks_go_and_come_in_batches(connection):
    chunks = [connection.chunk(number) for number in range(3)]
    for chunk in chunks:
        chunk.ref_count_up()
    connection.do(connection.connector.batched_put(KEYS[:3], chunks))
    assert [chunk.get_ref_count() for chunk in chunks] == [1, 1, 1]
    found = connection.do(connection.connector.batched_get([KEYS[3], *KEYS[:3]]))
    assert found[0] is None
    assert [int(chunk.tensor.max()) for chunk in found[1:]] == [0, 1, 2]
    assert [chunk.get_ref_count() for chunk in found[1:]] == [1, 1, 1]


def test_a_gap_ends_what_comes_without_waiting_and_the_rest_is_released(connection):
    for number in (0, 1, 3):
        connection.do(connection.connector.put(KEYS[number], connection.chunk(number)))
    before = connection.memory.memory_allocator.pin_allocator.num_active_allocations
    found = connection.do(connection.connector.batched_get_non_blocking("lookup", KEYS))
    assert [int(chunk.tensor.max()) for chunk in found] == [0, 1]
    assert connection.memory.memory_allocator.pin_allocator.num_active_allocations == before + 2


def test_lookups_wait_and_do_not_wait(connection):
    for number in (0, 1, 3):
        connection.do(connection.connector.put(KEYS[number], connection.chunk(number)))
    connector = connection.connector
    assert [connector.exists_sync(each) for each in KEYS] == [True, True, False, True]
    assert [connection.do(connector.exists(each)) for each in KEYS] == [True, True, False, True]
    assert connector.batched_contains(KEYS) == 2
    assert connector.batched_contains(KEYS[:2]) == 2
    assert connection.do(connector.batched_async_contains("lookup", KEYS)) == 2
    assert connector.remove_sync(KEYS[0])
    assert not connector.remove_sync(KEYS[0])
    assert connector.batched_contains(KEYS) == 0
    assert connection.do(connector.list()) == []
    assert connection.do(connector.ping()) == 0
    supports = ("ping", "batched_get", "batched_put", "batched_contains", "batched_async_contains")
    assert all(getattr(connector, f"support_{name}")() for name in (*supports, "batched_get_non_blocking"))


def test_partial_chunks_and_bytes_keep_their_shape(connection):
    part = connection.chunk(7, torch.Size((2, LAYERS, 100, HEADS * DIM)))
    connection.do(connection.connector.put(KEYS[0], part))
    assert connection.do(connection.connector.get(KEYS[0])).get_shapes() == [
        torch.Size((2, LAYERS, 100, HEADS * DIM))
    ]
    raw = connection.memory.allocate(torch.Size((300, 0, 0, 0)), torch.uint8, MemoryFormat.BINARY_BUFFER)
    raw.raw_data[:] = bytes(range(100)) * 3
    connection.do(connection.connector.put(KEYS[1], raw))
    found = connection.do(connection.connector.get(KEYS[1]))
    assert (found.get_memory_format(), bytes(found.byte_array)) == (
        MemoryFormat.BINARY_BUFFER,
        bytes(range(100)) * 3,
    )


def test_dtype_tags_and_other_identities_have_keys_of_their_own(connection, server):
    connection.do(connection.connector.put(KEYS[0], connection.chunk(1)))
    tagged = CacheEngineKey("org/model", 1, 0, 0, torch.bfloat16, {"lmcache.tag.user": "a"})
    half = CacheEngineKey("org/model", 1, 0, 0, torch.float16)
    assert [connection.connector.exists_sync(each) for each in (KEYS[0], tagged, half)] == [
        True,
        False,
        False,
    ]


def test_without_memory_a_chunk_is_a_miss(connection, monkeypatch):
    connection.do(connection.connector.put(KEYS[0], connection.chunk(1)))
    monkeypatch.setattr(connection.memory, "allocate", lambda *_, **__: None)
    assert connection.do(connection.connector.get(KEYS[0])) is None


@pytest.mark.parametrize(
    "layout",
    ["KV_2LTD torch.bfloat16[2, 2, 256, 127]", "no layout", "KV_NEW torch.uint8[131072]"],
)
def test_a_layout_that_makes_no_sense_is_a_miss(connection, layout, monkeypatch):
    from tq_connectors.lmcache import remote_connector

    fake = type("Layout", (), {"text": lambda self: layout})
    monkeypatch.setattr(remote_connector, "_layout_of", lambda chunk: fake())
    connection.do(connection.connector.put(KEYS[0], connection.chunk(1)))
    assert connection.do(connection.connector.get(KEYS[0])) is None


def test_a_caller_that_gives_up_leaves_nothing_behind(connection):
    connection.do(connection.connector.batched_put(KEYS, [connection.chunk(number) for number in range(4)]))
    allocator = connection.memory.memory_allocator.pin_allocator
    before = allocator.num_active_allocations
    inner = connection.connector.getWrappedConnector()
    started, gate, load = threading.Event(), threading.Event(), inner._load

    def slow_load(keys):
        started.set()
        gate.wait(10)
        return load(keys)

    inner._load = slow_load
    future = asyncio.run_coroutine_threadsafe(inner.batched_get(KEYS), connection.loop)
    assert started.wait(10)
    future.cancel()
    gate.set()
    connection.do(inner.close())
    connection.do(asyncio.sleep(0))
    assert allocator.num_active_allocations == before


def test_a_put_that_is_given_up_still_ends_before_its_memory_is_released(connection):
    inner = connection.connector.getWrappedConnector()
    started, gate, order = threading.Event(), threading.Event(), []

    def slow_save(keys, chunks):
        started.set()
        gate.wait(10)
        order.append("read")

    inner._save = slow_save
    chunk = connection.chunk(1)
    future = asyncio.run_coroutine_threadsafe(connection.connector.put(KEYS[0], chunk), connection.loop)
    assert started.wait(10)
    future.cancel()
    assert chunk.get_ref_count() == 1
    gate.set()
    connection.do(inner.close())
    assert order == ["read"]
    assert chunk.get_ref_count() == 0


def test_without_a_server_everything_is_a_miss(salt):
    with running_server() as gone:
        address = gone.address
    opened = Connection(written(address, salt, lookup_timeout="200ms", transfer_timeout="200ms"))
    chunk = opened.chunk(1)
    opened.do(opened.connector.put(KEYS[0], chunk))
    assert opened.do(opened.connector.get(KEYS[0])) is None
    assert opened.do(opened.connector.ping()) == 1
    assert not opened.connector.exists_sync(KEYS[0])
    opened.close()


@pytest.mark.parametrize("class_name", ["TQStoreConnectorAdapter", "TQStoreConnector"])
def test_a_wrong_setting_stops_the_engine(server, salt, class_name):
    with pytest.raises(IrrecoverableException, match="unknown setting 'adress'"):
        Connection(written(server.address, salt, class_name=class_name, adress="x"))


def test_the_connector_alone_serves_one_plugin_of_any_name(server, salt):
    settings = written(server.address, salt, name="shared.cache", class_name="TQStoreConnector")
    Connection(settings).close()
    settings["extra_config"]["remote_storage_plugin.other.class_name"] = "TQStoreConnector"
    with pytest.raises(IrrecoverableException, match="2 plugins have the class"):
        Connection(settings)


def run_engine(action: str, settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    path.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "engines.lmcache.engine_process", action, str(path)],
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, (done.stdout + done.stderr)[-4000:]
    return json.loads(answers[0].removeprefix("ANSWER "))


def test_engines_load_what_another_one_saved(server, client, salt, tmp_path):
    """By a lookup that waits, and by one that does not and loads meanwhile."""
    settings = written(server.address, salt)
    assert run_engine("save", settings, tmp_path)["found"] == 0
    for action in ("load", "load-async"):
        answer = run_engine(action, settings, tmp_path)
        assert answer == {"found": 4 * CHUNK, "loaded": 4 * CHUNK, "equal": [True] * 4}, action
    client.purge(None)
    assert run_engine("load-async", settings, tmp_path)["found"] == 0
