"""TQStoreConnector: pages of vLLM's cache in a tq-store, without its offloading framework.

``--kv-transfer-config '{"kv_connector": "TQStoreConnector", "kv_connector_module_path":
"tq_connectors.vllm.kv_connector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
"kv_connector_extra_config": {"revision": "...", "address": "..."}}'``, with `StoreSettings` and the client's
settings. Loads are asynchronous and saves follow the forward pass, with no hook in a layer, so that CUDA
graphs stay whole. Served: vLLM 0.26 to 0.33.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from tq_connectors.engine.state import load_state
from tq_connectors.vllm.connector_facts import engine_facts, heads_of_model, layers_as_bytes
from tq_connectors.vllm.engine_codecs import chunk_codecs
from tq_connectors.vllm.layout_names import check_layout, required_layout
from tq_connectors.vllm.page_mover import PageMover
from tq_connectors.vllm.page_moves import StepMoves
from tq_connectors.vllm.page_planner import PagePlanner, Progress
from tq_connectors.vllm.plan import plan_offload
from tq_connectors.vllm.process_facts import hash_seed
from tq_connectors.vllm.settings import read_settings
from tq_connectors.vllm.store_pages import rank_cache
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks


class TQStoreMetadata(KVConnectorMetadata):
    """What the scheduler's half tells the workers beside a step, and whether the step computes anything."""

    def __init__(self, moves: StepMoves, *, computes: bool) -> None:
        self.moves, self.computes = moves, computes


class TQStoreConnector(KVConnectorBase_V1):
    """Whole pages by vLLM's hashes of their tokens; a cache in bf16 or fp16 is quantized on the device.

    Args:
        vllm_config: The engine's.
        role: Whether this is the scheduler's half or a worker's.
        kv_cache_config: The engine's cache.

    Raises:
        ConfigError: A setting, or the engine's cache, is not served; the engine then does not start.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(
                'TQStoreConnector needs "kv_load_failure_policy": "recompute": a miss is no error'
            )
        self._settings, self._connection = read_settings(transfer.kv_connector_extra_config, os.environ)
        self._config, self._cache_config = vllm_config, kv_cache_config
        self._facts = engine_facts(vllm_config, kv_cache_config, self._settings.page_tokens)
        self._plan = plan_offload(
            self._facts, self._settings, partial(heads_of_model, vllm_config), load_state(os.environ)
        )
        self._rank = vllm_config.parallel_config.rank if role == KVConnectorRole.WORKER else 0
        self._client = StoreClient(config=self._connection)
        self._cache = rank_cache(
            self._client, self._plan, rank=self._rank, most_ranks=self._settings.most_ranks
        )
        self._requests: dict[str, Request] = {}
        self._mover: PageMover | None = None
        self._failed_blocks: set[int] = set()
        self._planner: PagePlanner | None = None
        if role == KVConnectorRole.SCHEDULER:
            _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
            self._planner = PagePlanner(
                self._cache.lookup,
                self._plan.names(0, hash_seed).key,
                page_tokens=self._plan.chunk_tokens,
                block_tokens=self._facts.block_tokens[0],
                hash_tokens=hash_tokens,
                shares_blocks=bool(vllm_config.cache_config.enable_prefix_caching),
                lookup_timeout_s=self._connection.lookup_timeout_s,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a future miss, nothing that anybody waits for."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Blocks of a layer in one run, one head after the other."""
        return required_layout()

    def shutdown(self) -> None:
        """Finish what runs, and close the connection."""
        if self._planner is not None:
            self._planner.close()
        if self._mover is not None:
            self._mover.close()
        self._cache.close()
        self._client.close()

    # the workers' half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the engine's blocks, and try a page out on them."""
        check_layout(self._facts.layout, kv_caches.values())
        (codec,) = chunk_codecs(
            [layers_as_bytes(self._cache_config, kv_caches)],
            self._plan,
            rank=self._rank,
            blocks_per_chunk=self._facts.blocks_per_chunk,
            layout=self._facts.layout,
            staging_bytes=self._settings.staging_bytes,
        )
        self._mover = PageMover(
            self._cache,
            codec,
            staging_bytes=self._settings.staging_bytes,
            host_bytes=self._settings.host_bytes,
            load_threads=self._settings.load_threads,
            load_timeout_s=self._connection.transfer_timeout_s,
        )

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Wait for blocks that are being read, where they may be overwritten now."""
        assert isinstance(kv_connector_metadata, TQStoreMetadata)
        if kv_connector_metadata.moves.overwrites:
            self._worker.wait_for_saves()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Begin the loads of this step, and its saves where no forward pass comes before them.

        vLLM before 0.31 does not call `wait_for_save` in such a step.
        """
        step = self._step
        self._worker.start(step.moves)
        if not step.computes:
            self._worker.save(step.moves)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No request runs before all of its pages are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Pages are saved after the forward pass."""

    def wait_for_save(self) -> None:
        """Begin the saves of this step; nothing is waited for."""
        step = self._step
        if step.computes:
            self._worker.save(step.moves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Finished requests that are no longer read, and requests whose load has ended."""
        sent, received, failed = self._worker.take_finished()
        self._failed_blocks |= failed
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were not filled; vLLM computes them."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    # the scheduler's half

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the store has after those computed, to be loaded asynchronously."""
        self._requests[request.request_id] = request
        num_tokens = self._scheduler.matched(request, num_computed_tokens)
        return num_tokens, bool(num_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """Plan a load into a request's blocks."""
        if num_external_tokens:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What is moved beside this step."""
        overwrites = bool(scheduler_output.preempted_req_ids)
        return TQStoreMetadata(
            self._scheduler.step(self._progress(scheduler_output), overwrites=overwrites),
            computes=bool(scheduler_output.total_num_scheduled_tokens),
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have done."""
        self._scheduler.moved(
            connector_output.finished_recving or (),
            connector_output.finished_sending or (),
            connector_output.invalid_block_ids,
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Save what is left of a request; True keeps its blocks until they are no longer read."""
        self._requests.pop(request.request_id, None)
        num_final = request.num_computed_tokens
        if request.status != RequestStatus.FINISHED_ABORTED:
            num_final = max(request.num_prompt_tokens, request.num_tokens - 1)
        return self._scheduler.finished(request, min(num_final, request.num_tokens - 1)), None

    def has_pending_push_work(self) -> bool:
        """Whether the engine must step on without requests."""
        return self._scheduler.has_pending_work

    def _progress(self, output: SchedulerOutput) -> Iterator[Progress]:
        for request_id, blocks, is_resumed in yield_req_data(output):
            request = self._requests.get(request_id)
            if request is not None:
                yield Progress(
                    request,
                    blocks[0] if blocks else (),
                    is_resumed,
                    request.num_computed_tokens,
                    output.num_scheduled_tokens[request_id],
                )

    @property
    def _step(self) -> TQStoreMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, TQStoreMetadata)
        return metadata

    @property
    def _worker(self) -> PageMover:
        assert self._mover is not None
        return self._mover

    @property
    def _scheduler(self) -> PagePlanner:
        assert self._planner is not None
        return self._planner
