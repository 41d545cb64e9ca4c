"""TQStoreTier: tq-store as a tier below vLLM's host memory, for its `TieringOffloadingSpec` or ours.

Named in `secondary_tiers` as ``{"type": "TQStoreTier", "module_path": "tq_connectors.vllm.secondary_tier",
...}``. Served: vLLM 0.30 to 0.33.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult

from tq_connectors.engine.interpreter import share_interpreter
from tq_connectors.engine.state import load_state
from tq_connectors.task_queue import TaskQueue
from tq_connectors.vllm.offload_facts import engine_facts, heads_of_model
from tq_connectors.vllm.plan import plan_offload
from tq_connectors.vllm.process_facts import hash_seed
from tq_connectors.vllm.releases import require_offloading
from tq_connectors.vllm.settings import read_settings
from tq_connectors.vllm.store_rows import Row, StoredRows
from tq_connectors.vllm.tier_base import TierBase, job_result
from tq_store.client import StoreClient
from tq_store.keys import BlockKey

if TYPE_CHECKING:
    from vllm.v1.kv_offload.tiering.base import TransferJob


class TQStoreTier(TierBase):
    """Chunks of host memory as blocks of a tq-store server.

    Calls come from the engine's scheduler and never wait: threads of ours talk to the store. A lookup asks
    whether a chunk exists, not for its bytes. A chunk is promoted only when its checksums, its key and its
    shape are right; whatever fails or comes late is a miss, and the engine computes it.

    Args:
        offloading_spec: The engine's; where it is ours, it has planned what a row is.
        primary_kv_view: ``[num_chunks, row bytes]`` of host memory.
        tier_type: What vLLM calls this tier.
        backpressure_detector: vLLM's, where it has one.
        **written: `StoreSettings` and the client's settings.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed; the engine then does not start.
    """

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **written: Any,
    ) -> None:
        require_offloading()
        share_interpreter()
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        settings, connection = read_settings(written, os.environ)
        config = offloading_spec.config
        plan = getattr(offloading_spec, "plan", None) or plan_offload(
            engine_facts(config), settings, partial(heads_of_model, config), load_state(os.environ)
        )
        self._names = {group.group_id: plan.names(group.group_id, hash_seed) for group in config.groups}
        self._memory = primary_kv_view.cast("B")  # a view of two dimensions gives no rows
        self._client = StoreClient(config=connection)
        self._rows = StoredRows(self._client, plan.rows, load_threads=settings.load_threads)
        self._lookups = _Lookups(tier_type, lambda keys: self._rows.contains(self._block_keys(keys)))
        pending = settings.max_pending_tasks
        self._stores, self._loads = (
            TaskQueue[JobResult](
                f"vllm-{name}", num_threads=num_threads, max_pending=pending, announce=lambda: None
            )
            for name, num_threads in (("store", settings.store_threads), ("load", settings.load_threads))
        )
        self._loading: dict[int, Sequence[OffloadKey]] = {}

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk exists; RETRY until the store has said so."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: "TransferJob") -> None:
        """Put chunks that the store lacks; their memory is read until the job is done."""
        failed = JobResult(job_metadata.job_id, success=False)
        self._stores.submit(self._work(self._rows.put, job_metadata), failed)

    def submit_load(self, job_metadata: "TransferJob") -> None:
        """Get chunks; their memory is written until the job is done."""
        self._loading[job_metadata.job_id] = list(job_metadata.keys)
        failed = JobResult(job_metadata.job_id, success=False)
        self._loads.submit(self._work(self._rows.get, job_metadata), failed)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that are done, each once; a chunk that did not come is a miss from now on."""
        loads = list(self._loads.take_all().values())
        for result in loads:
            loaded = set(result.successful_keys or ())
            keys = self._loading.pop(result.job_id)
            if not result.success:
                self._lookups.mark_miss([key for key in keys if key not in loaded])
        return [*self._stores.take_all().values(), *loads]

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks as they come are what the store wants."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget what a request asked for."""
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Send the lookups of this step."""
        self._lookups.flush()

    def drain_jobs(self) -> None:
        """Wait until no job waits or runs; the client's deadlines bound that."""
        self._stores.drain()
        self._loads.drain()

    def shutdown(self) -> None:
        """Stop the threads and close the connection."""
        self._lookups.shutdown()
        self._stores.close()
        self._loads.close()
        self._rows.close()
        self._client.close()
        self._memory.release()

    def _work(
        self, move: Callable[[Sequence[Row]], list[bool]], job: "TransferJob"
    ) -> Callable[[], JobResult]:
        keys = list(job.keys)
        chunks = [int(chunk) for chunk in job.chunk_ids]
        size = self.row_bytes

        def work() -> JobResult:
            started = time.monotonic()
            rows = [
                Row(key, self._memory[chunk * size : (chunk + 1) * size])
                for key, chunk in zip(self._block_keys(keys), chunks, strict=True)
            ]
            done = [key for key, is_done in zip(keys, move(rows), strict=True) if is_done]
            return job_result(
                job_id=job.job_id,
                success=len(done) == len(keys),
                successful_keys=tuple(done),
                transfer_time=time.monotonic() - started,
                transfer_bytes=len(done) * size,
            )

        return work

    def _block_keys(self, keys: Sequence[OffloadKey]) -> list[BlockKey]:
        return [self._names[get_offload_group_idx(key)].key(get_offload_block_hash(key)) for key in keys]


class _Lookups(AsyncLookupManager):
    """vLLM's batches of lookups, each one call to the store."""

    def __init__(self, tier_type: str, contains: Callable[[Sequence[OffloadKey]], list[bool]]) -> None:
        self._contains = contains
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        """Which chunks exist, on a thread of vLLM's."""
        return self._contains(keys)
