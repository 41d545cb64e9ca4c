"""TQOffloadingSpec: vLLM's tiers of host memory and below, with chunks that are quantized on the device.

In `kv_connector_extra_config` of the `OffloadingConnector`: ``"spec_name": "TQOffloadingSpec"``,
``"spec_module_path": "tq_connectors.vllm.offload_spec"``, vLLM's own `cpu_bytes_to_use`, and an object
``"tq_store"`` with `StoreSettings`; with an ``"address"`` in it, a tq-store server is the tier below. Served:
vLLM 0.30 to 0.33.
"""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import pin_mmap_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tq_connectors.engine.state import load_state
from tq_connectors.vllm.engine_codecs import chunk_codecs
from tq_connectors.vllm.offload_facts import engine_facts, heads_of_model
from tq_connectors.vllm.offload_worker import TQOffloadingWorker
from tq_connectors.vllm.plan import Mode, plan_offload
from tq_connectors.vllm.releases import require_offloading
from tq_connectors.vllm.settings import read_settings

SETTINGS = "tq_store"


class TQOffloadingSpec(TieringOffloadingSpec):
    """Host memory, and what is below it, hold packed pages; a cache that is packed already moves as it is.

    Raises:
        ConfigError: A setting, or the engine's cache, is not served; the engine then does not start.
    """

    secondary_tier_configs: list[dict[str, Any]]
    _worker: OffloadingWorker | None

    def __init__(self, config: OffloadingConfig) -> None:
        require_offloading()
        written = dict(config.extra_config.get(SETTINGS, {}))
        self._settings, _ = read_settings(written, os.environ)
        self.plan = plan_offload(
            engine_facts(config), self._settings, partial(heads_of_model, config), load_state(os.environ)
        )
        super().__init__(replace(config, worker_kv_bytes_per_block=self.plan.cell_bytes_per_block))
        if "address" in written:
            tier = {"type": "TQStoreTier", "module_path": "tq_connectors.vllm.secondary_tier"}
            self.secondary_tier_configs = [*self.secondary_tier_configs, {**tier, **written}]

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this rank, on a CPU as on a GPU."""
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A worker on this rank's part of the host memory; vLLM's own where bytes move as they are."""
        if self.plan.mode is Mode.RAW and current_platform.is_cuda_alike():
            return super().create_worker(kv_caches)
        codecs = chunk_codecs(
            [
                [kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
                for refs in kv_caches.group_data_refs
            ],
            self.plan,
            rank=self.config.parallel.rank,
            blocks_per_chunk=self.blocks_per_chunk,
            layout=self.config.kv_cache_layout,
            staging_bytes=self._settings.staging_bytes,
        )
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            if codecs[0].device.type == "cuda":
                pin_mmap_region(region)
            cells = region.create_next_worker_view(codecs[0].cell_bytes).view(torch.uint8)
            return TQOffloadingWorker(codecs, region, cells, staging_bytes=self._settings.staging_bytes)
        except Exception:
            region.cleanup()
            raise
