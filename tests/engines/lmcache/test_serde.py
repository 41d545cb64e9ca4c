"""The serde in LMCache's wrapper, over our store, Redis and files: exact sizes, and only sound chunks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from engines.lmcache.objects import Controller, checked, make_adapter, object_key, plugin
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.serde import get_registered_serde_types

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import CodecState, pack_state
from tq_connectors.engine.state import STATE_VARIABLE
from tq_connectors.lmcache.chunk_codec import ChunkCodec
from tq_connectors.lmcache.serde import register_serde
from tq_connectors.lmcache.serde_settings import read_serde_settings
from tq_kernels import PageLayout, preset
from tq_store.errors import ConfigError

HEADS, DIM, LAYERS, TOKENS = 2, 64, 2, 256
TQ4 = {"type": "tq", "preset": "tq4", "num_kv_heads": HEADS, "head_dim": DIM}
SEAL = {"type": "tq", "preset": "none"}
SPLIT = (2, LAYERS, TOKENS, HEADS * DIM)
FUSED = (LAYERS, TOKENS, HEADS * 2 * DIM)


def chunks(
    shape: tuple[int, ...] = SPLIT, count: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def keys_of(count: int = 4, *, model: str) -> list[Any]:
    return [object_key(number, model=model) for number in range(count)]


@pytest.fixture
def redis_client(redis_server):
    with redis.Redis(port=redis_server.port) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def backends(server, salt, client, redis_server, redis_client, tmp_path: Path) -> dict[str, dict[str, Any]]:
    resp = {"type": "resp", "host": "127.0.0.1", "port": redis_server.port, "num_workers": 1}
    files = {"type": "fs", "base_path": str(tmp_path)}
    return {
        "store": plugin(server.address, salt=salt, codec="serde:tq4"),
        "redis": resp,
        "checked redis": checked(**resp),
        "checked files": checked(**files),
    }


def open_controller(spec: dict[str, Any], serde: dict[str, Any]) -> Controller:
    register_serde()  # what importing our adapters does, where the JSON names none of them
    return Controller(make_adapter(spec | {"serde": serde}))


@pytest.mark.parametrize("shape", [SPLIT, FUSED])
@pytest.mark.parametrize("backend", ["store", "redis", "checked redis", "checked files"])
def test_chunks_come_back_as_the_codec_makes_them(backends, backend, shape, salt):
    keys, written = keys_of(model=salt), chunks(shape)
    writer = open_controller(backends[backend], TQ4)
    assert writer.store(keys, written)
    writer.adapter.close()
    reader = open_controller(backends[backend], TQ4)
    assert reader.find(keys) == [True] * 4
    codec = ChunkCodec(read_serde_settings({name: TQ4[name] for name in TQ4 if name != "type"}))
    for found, chunk in zip(reader.load(keys, written[0]), written, strict=True):
        assert found is not None
        error = (found.float() - chunk.float()).norm() / chunk.float().norm()
        assert 0.05 < error < 0.11  # it was quantized, and to 4 bits
    assert codec.packed_bytes([shape], [torch.bfloat16]) * 3.4 < written[0].nbytes
    reader.adapter.close()


def test_chunks_are_made_with_the_state_and_no_other_reader_takes_them(backends, salt, tmp_path, monkeypatch):
    keys, written = keys_of(model=salt), chunks()
    balance = torch.ones(LAYERS, HEADS, DIM)
    balance[:, :, 3] = 16
    for chunk in written:
        chunk[0, :, :, 3::DIM] *= 16  # keys of a channel that stands out
    file = tmp_path / "state"
    geometry = CacheGeometry(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="bfloat16")
    layout = PageLayout(spec=preset("tq4"), head_dim=DIM, num_kv_heads=HEADS, page_tokens=64)
    namespace = namespace_for(layout, geometry, model="m", revision="1", salt="")
    file.write_bytes(pack_state(CodecState(balance), namespace, geometry))
    monkeypatch.setenv(STATE_VARIABLE, str(file))
    writer = open_controller(backends["redis"], TQ4)
    assert writer.store(keys, written)
    for found, chunk in zip(writer.load(keys, written[0]), written, strict=True):
        error = (found.float() - chunk.float())[0, :, :, 4::DIM].norm() / chunk.float()[
            0, :, :, 4::DIM
        ].norm()
        assert error < 0.13
    writer.adapter.close()
    monkeypatch.delenv(STATE_VARIABLE)
    reader = open_controller(backends["redis"], TQ4)
    assert all(found is None for found in reader.load(keys, written[0]))
    reader.adapter.close()


def test_what_lies_in_redis_has_the_size_that_was_said(backends, redis_client, salt):
    controller = open_controller(backends["redis"], TQ4)
    controller.store(keys_of(model=salt), chunks())
    size = ChunkCodec(read_serde_settings({name: TQ4[name] for name in TQ4 if name != "type"})).packed_bytes(
        [SPLIT], [torch.bfloat16]
    )
    assert [redis_client.strlen(key) for key in redis_client.scan_iter()] == [size] * 4
    controller.adapter.close()


def damage(connection: redis.Redis, how: str, number: int = 1) -> None:
    """Spoil the value of one chunk."""
    (name,) = [key for key in connection.scan_iter() if number.to_bytes(32, "big").hex().encode() in key]
    value = bytearray(connection.get(name))
    if how == "bit":
        value[len(value) // 2] ^= 1
    elif how == "truncated":
        value = value[: len(value) // 2]
    elif how == "zeros":
        value = bytearray(len(value))
    elif how == "another chunk":
        (other,) = [key for key in connection.scan_iter() if (0).to_bytes(32, "big").hex().encode() in key]
        value = bytearray(connection.get(other))
    connection.set(name, bytes(value))


@pytest.mark.parametrize("serde", [TQ4, SEAL])
@pytest.mark.parametrize("how", ["bit", "zeros", "another chunk"])
def test_one_damaged_chunk_is_one_miss(backends, redis_client, salt, serde, how):
    controller, keys = open_controller(backends["checked redis"], serde), keys_of(model=salt)
    assert controller.store(keys, chunks())
    damage(redis_client, how)
    assert [one is None for one in controller.load(keys, chunks()[0])] == [False, True, False, False]
    controller.adapter.close()


def test_a_truncated_chunk_is_a_miss(backends, redis_client, salt):
    """LMCache's Redis client then loses its place, so what it reads after that is a miss too."""
    controller, keys = open_controller(backends["checked redis"], TQ4), keys_of(model=salt)
    assert controller.store(keys, chunks())
    damage(redis_client, "truncated")
    assert [one is None for one in controller.load(keys, chunks()[0])][:2] == [False, True]
    controller.adapter.close()


def test_without_the_checked_adapter_a_damaged_chunk_is_still_no_hit(backends, redis_client, salt):
    """LMCache's wrapper then fails the whole task, which is why there is a checked adapter."""
    controller, keys = open_controller(backends["redis"], TQ4), keys_of(model=salt)
    controller.store(keys, chunks())
    damage(redis_client, "bit")
    assert controller.load(keys, chunks()[0]) == [None] * 4
    controller.adapter.close()


@pytest.mark.parametrize("serde", [None, {"type": "fp8"}])
def test_lmcache_alone_serves_the_damaged_chunk(backends, redis_client, salt, serde):
    """What we are compared with; if this fails, LMCache has begun to verify: say so on our pages."""
    spec = backends["redis"] | ({} if serde is None else {"serde": serde})
    controller, keys = Controller(make_adapter(spec)), keys_of(model=salt)
    controller.store(keys, chunks())
    before = controller.load(keys, chunks()[0])
    damage(redis_client, "zeros")
    after = controller.load(keys, chunks()[0])
    assert after[1] is not None
    assert not torch.equal(after[1], before[1])
    controller.adapter.close()


@pytest.mark.parametrize("backend", ["checked redis", "redis"])
@pytest.mark.parametrize(
    ("reader", "dtype"),
    [
        (TQ4, torch.float16),
        (TQ4 | {"preset": "k3v4"}, torch.bfloat16),
        (TQ4 | {"num_kv_heads": 4, "head_dim": 32}, torch.bfloat16),
        (TQ4 | {"page_tokens": 128}, torch.bfloat16),
    ],
)
def test_another_preset_dtype_or_shape_reads_nothing(backends, backend, salt, reader, dtype):
    writer = open_controller(
        backends[backend], TQ4 | ({"preset": "k4v3"} if reader["preset"] == "k3v4" else {})
    )
    keys = keys_of(model=salt)
    assert writer.store(keys, chunks())
    writer.adapter.close()
    other = open_controller(backends[backend], reader)
    assert other.load(keys, chunks(dtype=dtype)[0]) == [None] * 4
    other.adapter.close()


def test_lmcache_alone_reads_one_fp8_as_the_other(backends, redis_client, salt):
    """What we are compared with."""
    writer = Controller(make_adapter(backends["redis"] | {"serde": {"type": "fp8"}}))
    keys = keys_of(model=salt)
    writer.store(keys, chunks())
    writer.adapter.close()
    reader = Controller(
        make_adapter(backends["redis"] | {"serde": {"type": "fp8", "fp8_dtype": "float8_e5m2"}})
    )
    found = reader.load(keys, chunks()[0])
    assert found[0] is not None
    assert (found[0].float() - chunks()[0].float()).norm() / chunks()[0].float().norm() > 0.3
    reader.adapter.close()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((LAYERS, TOKENS, 576), torch.bfloat16), (SPLIT, torch.uint8), ((5, *SPLIT), torch.bfloat16)],
)
def test_a_layout_that_cannot_be_packed_is_said_and_stores_nothing(backends, salt, shape, dtype):
    controller = open_controller(backends["checked redis"], TQ4)
    with pytest.raises(ValueError, match="the serde was told 2 KV heads of 64 channels"):
        controller.store(keys_of(1, model=salt), [torch.zeros(shape, dtype=dtype)])
    controller.adapter.close()


@pytest.mark.parametrize(
    ("serde", "message"),
    [
        ({"type": "tq"}, "preset"),
        ({"type": "tq", "preset": "tq9", "num_kv_heads": 2, "head_dim": 64}, "unknown preset"),
        ({"type": "tq", "preset": "tq4"}, "num_kv_heads"),
        (TQ4 | {"head_size": 64}, "head_size"),
    ],
)
def test_a_wrong_setting_stops_lmcache_at_its_start(backends, serde, message):
    with pytest.raises(ConfigError, match=message):
        make_adapter(backends["store"] | {"serde": serde})


@pytest.mark.parametrize(
    "params", [{}, {"inner": "resp"}, {"inner": {}}, {"inner": {"type": "mock"}, "x": 1}]
)
def test_a_checked_adapter_without_an_inner_one_stops_lmcache(params):
    with pytest.raises(ConfigError, match="a checked adapter is written as"):
        make_adapter(checked(type="mock") | {"adapter_params": params})


def test_the_serde_is_registered_once():
    register_serde()
    register_serde()
    assert get_registered_serde_types().count("tq") == 1


class Listener(L2AdapterListener):
    def __init__(self, heard: list[Any]) -> None:
        self._heard = heard

    def on_l2_keys_stored(self, keys, sizes):
        self._heard.append(keys)

    def on_l2_keys_accessed(self, keys):
        pass

    def on_l2_keys_deleted(self, keys):
        pass


def test_the_checked_adapter_passes_everything_else_on(salt, caplog):
    mock = {"type": "mock", "max_size_gb": 0.1, "mock_bandwidth_gb": 10}
    adapter = make_adapter(checked(**mock))
    controller, keys = Controller(make_adapter(checked(**mock) | {"serde": SEAL})), keys_of(model=salt)
    assert controller.store(keys, chunks())
    inner = controller.adapter.inner_adapter
    assert inner.get_usage().total_bytes_used > 4 * chunks()[0].nbytes
    assert inner.supports_global_eviction
    controller.adapter.submit_unlock(keys)
    controller.adapter.delete(keys)
    assert controller.find(keys) == [False] * 4
    assert inner.report_status()["rejected_chunks"] == 0
    with pytest.raises(NotImplementedError):
        inner.list_l2_keys()
    heard: list[Any] = []
    adapter.register_listener(Listener(heard))
    adapter.set_backend_identity("checked")
    raw = Controller(adapter)
    assert raw.store(keys, chunks())
    assert heard == [keys]
    with caplog.at_level(logging.WARNING):
        assert raw.load(keys, chunks()[0]) == [None] * 4  # no serde, so no header of ours
    assert adapter.query_load_result(99) is None
    assert adapter.report_status()["rejected_chunks"] == 4
    adapter.close()
    controller.adapter.close()


def test_chunks_that_lmcaches_faults_drop_are_the_only_misses(server, salt, client):
    inner = plugin(server.address, salt=salt, codec="serde:tq4")
    spec = {"type": "fault_inject", "gap_indices": [2], "inner": inner, "serde": TQ4}
    controller, keys = Controller(make_adapter(spec)), keys_of(model=salt)
    assert controller.store(keys, chunks())
    assert controller.find(keys) == [True] * 4
    assert [one is None for one in controller.load(keys, chunks()[0])] == [False, False, True, False]
    assert controller.adapter.report_status()["fault_inject"]["gap_indices"] == [2]
    controller.adapter.close()
