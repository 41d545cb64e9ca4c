"""Our server module beside LMCache's own: what a worker registers is looked at once."""

import logging
from types import SimpleNamespace

import pytest
from engines.lmcache.objects import plugin
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.distributed.serde import SerdeConfig
from lmcache.v1.multiprocess.custom_types import RegisterEngineDrivenContextPayload
from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
from lmcache.v1.multiprocess.modules.engine_driven_transfer import EngineDrivenTransferModule

from tq_connectors.lmcache.layout_check import build_server_modules

TQ4 = {"preset": "tq4", "num_kv_heads": 2, "head_dim": 64}


@pytest.fixture
def context(server, salt):
    adapter = PluginL2AdapterConfig.from_dict(plugin(server.address, salt=salt, codec="serde:tq4"))
    adapter.serde_config = SerdeConfig(type="tq", kwargs=TQ4)
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
    opened = MPCacheServerContext(
        StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=memory),
            eviction_config=EvictionConfig("LRU"),
            l2_adapter_config=L2AdaptersConfig([adapter]),
        )
    )
    yield opened
    opened.close()


def register(module: EngineDrivenTransferModule, number: int, width: int) -> None:
    """A worker of a model with two planes of so many channels."""
    module.register_kv_cache_engine_driven_context(
        RegisterEngineDrivenContextPayload(
            instance_id=number,
            model_name=f"org/{width}",
            world_size=1,
            block_size=64,
            num_layers=2,
            hidden_dim_size=width,
            dtype_str="bfloat16",
            use_mla=False,
            num_physical_slots=256,
        )
    )


def test_each_worker_is_looked_at_once_and_again_when_it_comes_back(context, caplog):
    transfers = EngineDrivenTransferModule(context)
    check = build_server_modules(SimpleNamespace(server_context=context, modules=(transfers,)))
    assert check.context is context
    with caplog.at_level(logging.ERROR):
        check.touch_instance(1)  # not registered yet
        register(transfers, 1, 128)
        check.touch_instance(1)
        assert check.report_status() == {"refused_layouts": {}}
        register(transfers, 2, 192)
        check.touch_instance(2)
        check.touch_instance(2)
    assert list(check.report_status()["refused_layouts"]) == [2]
    (said,) = [record for record in caplog.records if "will be stored" in record.message]
    assert "nothing of model org/192 will be stored" in said.message
    assert "neither two planes of 128 nor one of 256 channels" in said.message
    check.drop_instance_state(2)
    assert check.report_status() == {"refused_layouts": {}}
    check.touch_instance(2)
    assert list(check.report_status()["refused_layouts"]) == [2]
    check.close()
    transfers.close()
