"""TQCacheLinker: SGLang's pool on the device straight to tq-store, without a host tier. SGLang 0.5.23."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.utils import get_device_module

from tq_connectors.sglang.device_pages import (
    DevicePacked,
    DevicePool,
    DeviceQuantized,
    DeviceRows,
    LayerCodec,
)
from tq_connectors.sglang.engine_model import read_place
from tq_connectors.sglang.fetches import Fetches
from tq_connectors.sglang.hicache_settings import read_settings
from tq_connectors.sglang.page_setup import Codecs, open_page_store
from tq_connectors.sglang.worker import Worker
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

logger = logging.getLogger(__name__)

_FETCH_THREADS = 4


class _Load(NamedTuple):
    """Pages of one request: their bytes in host memory, and where they go."""

    stored: torch.Tensor
    slots: torch.Tensor


class _Offload(NamedTuple):
    """Pages to save once these events have come."""

    hashes: list[str]
    slots: torch.Tensor
    events: list[Any]


class TQCacheLinker(UnifiedCacheLinker):
    """Saves pages from the device and loads them back layer by layer.

    SGLang aborts a request whose load fails after it was begun. So pages are fetched when a request is looked
    up, and a load is begun only when all of them are in host memory, sound. What is late by then is a miss,
    and the request is computed.

    Args:
        server_args: SGLang's.
        params: SGLang's; the pool among them.
        components: Parts of SGLang's cache; full attention alone is served.
        extra_config: `PageSettings` and the client's settings.
        forward_stream: On which the pool is written.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed, or the pool is one that the linker cannot
            serve; the engine then does not start.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[ComponentType],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        settings, connection = read_settings(extra_config or {}, os.environ, is_linker=True)
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        _check_served(pool, params, components)
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: pool}
        self._group = params.attn_tp_cache_group or params.tp_cache_group
        is_alone = self._group is None or not dist.is_initialized()
        self._num_ranks = 1 if is_alone else dist.get_world_size(self._group)
        place = read_place(
            settings.model or server_args.served_model_name or server_args.model_path,
            tp_rank=0 if is_alone else dist.get_rank(self._group),
            tp_size=self._num_ranks,
            pp_rank=params.pp_rank,
            pp_size=params.pp_size,
        )
        keys, values = (_as_float8(side, place.float8) for side in (pool.k_buffer, pool.v_buffer))
        self._device = DevicePool(keys, values, params.page_size)
        makers = (partial(each, self._device) for each in (DeviceRows, DevicePacked, DeviceQuantized))
        self._client = StoreClient(config=connection)
        self._store = open_page_store(
            self._client,
            replace(settings, device=str(self._device.device)),
            self._device.shape,
            place,
            codecs=Codecs(*makers),
            group=None if is_alone else self._group,
        )
        self._codec = cast(LayerCodec, self._store.codec)
        self._fetches = Fetches(
            self._store,
            page_bytes=self._store.stored_page_bytes,
            num_layers=self._store.num_layers,
            budget_bytes=settings.fetch_memory_bytes,
            wait_s=settings.load_wait_s,
            num_threads=_FETCH_THREADS,
            pinned=self._device.device.type == "cuda",
        )
        self._max_waiting_pages = settings.fetch_memory_bytes // self._store.stored_page_bytes
        self._waiting_pages = 0
        self._lock = threading.Lock()
        self.layer_done_counter = LayerWiseLoadCounter(len(pool.k_buffer))
        self._pending: dict[str, _Load] = {}
        self._results: queue.Queue[bool] = queue.Queue()
        self._loads, self._offloads = (
            Worker(f"tq-store-{name}", self._device.device) for name in ("load", "offload")
        )

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every number of leading pages that can be restored; they are on their way when this returns."""
        keys = _keys_of(transfers)
        return list(range(1, self._guarded(lambda: self._fetches.begin(rid, keys), 0) + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue a load if its pages come on every rank, at most `load_wait` after they were looked up."""
        (transfer,) = transfers
        stored = self._guarded(lambda: self._fetches.take(rid, _keys_of(transfers)), None)
        if not self._all_ranks(stored is not None) or stored is None:
            return False
        self._pending[rid] = _Load(stored, transfer.device_indices)
        return True

    def start_layer_wise_loading(self) -> int:
        """Start what is queued; returns the batch that the forward pass waits on, -1 for none."""
        if not self._pending:
            return -1
        loads, self._pending = list(self._pending.values()), {}
        index = int(self.layer_done_counter.update_producer())
        ready = get_device_module().Event()
        ready.record()
        self._loads.put(lambda: self._load_layers(index, loads, ready))
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until a batch writes no more to the pool; True when all of it landed."""
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        """Forget a load that has not been started."""
        return self._pending.pop(rid, None) is not None

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Save pages soon. Pages beyond the memory for them are not saved; SGLang hears of it in order."""
        keys = _keys_of(transfers)
        if not keys:
            return False
        (transfer,) = (each for each in transfers if each.name == PoolName.KV)
        work = _Offload(keys, transfer.device_indices, self.record_offload_ready())
        with self._lock:
            is_taken = self._waiting_pages + len(keys) <= self._max_waiting_pages
            self._waiting_pages += len(keys) if is_taken else 0
        self._offloads.put(lambda: self._results.put(is_taken and self._save(work)))
        return True

    def num_completed_offloads(self) -> int:
        """Offloads that are done."""
        return self._results.qsize()

    def pop_completed_offload(self) -> bool:
        """Whether the oldest of them was saved."""
        return self._results.get_nowait()

    def reset(self) -> None:
        """Wait until nothing is under way, and forget everything but what is in the store."""
        self._pending.clear()
        self._fetches.clear()
        self._loads.join()
        self._offloads.join()
        while not self._results.empty():
            self._results.get_nowait()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Cut the connection, and wait until nothing touches the pool."""
        self._client.close()
        self.reset()
        self._fetches.close()
        self._store.close()
        self._loads.close()
        self._offloads.close()

    @property
    def counters(self) -> dict[str, int]:
        """What was moved and what went wrong since the start."""
        return {**self._store.count_everything(), "late_fetches": self._fetches.late_fetches}

    def _all_ranks(self, is_so: bool) -> bool:
        """Whether it is so on every rank: all of them load, or none."""
        if self._num_ranks == 1:
            return is_so
        answer = torch.tensor([int(is_so)], dtype=torch.int)
        dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._group)
        return bool(answer.item())

    def _load_layers(self, index: int, loads: list[_Load], ready: Any) -> None:
        try:
            ready.synchronize()
            for layer in range(self.layer_done_counter.num_layers):
                for load in loads:
                    self._codec.unpack_layer(load.stored, layer, load.slots)
                landed = get_device_module().Event()
                landed.record()
                landed.synchronize()
                self.layer_done_counter.complete(index, layer)
        except Exception as error:
            logger.exception("pages could not be written into the pool")
            self.layer_done_counter.fail(index, error)

    def _save(self, work: _Offload) -> bool:
        def save() -> bool:
            for event in work.events:
                event.synchronize()
            pages = work.slots.split(self._device.page_tokens)
            return all(self._store.save(work.hashes, pages.__getitem__))

        is_saved = bool(self._guarded(save, False))
        with self._lock:
            self._waiting_pages -= len(work.hashes)
        return is_saved

    def _guarded(self, call: Callable[[], Any], miss: Any) -> Any:
        """What the call returns; whatever goes wrong in it is logged, and a miss."""
        try:
            return call()
        except Exception:
            logger.exception("a call to the store failed in us, which is a miss")
            return miss


def _keys_of(transfers: list[PoolTransfer]) -> list[str]:
    return [key for each in transfers if each.name == PoolName.KV for key in each.keys or ()]


def _as_float8(buffers: list[torch.Tensor], float8: torch.dtype | None) -> list[torch.Tensor]:
    """Buffers of an fp8 cache, which hold bytes for SGLang, as what they are."""
    return list(buffers) if float8 is None else [buffer.view(float8) for buffer in buffers]


def _check_served(pool: Any, params: Any, components: set[ComponentType]) -> None:
    """Refuse what has more than keys and values of full attention."""
    reason = None
    if components != {ComponentType.FULL}:
        reason = "this model has more than full attention"
    elif not hasattr(pool, "k_buffer") or not hasattr(pool, "v_buffer"):
        reason = f"a {type(pool).__name__} has no keys and values of heads"
    elif getattr(pool, "k_scale_buffer", None) is not None:
        reason = "the pool keeps scales beside its keys and values"
    elif params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        reason = "a draft model keeps keys and values besides"
    elif params.attn_cp_size > 1:
        reason = "context parallelism cuts pages between ranks"
    if reason:
        raise ConfigError(f"the linker takes whole pages of keys and values of heads; {reason}")
