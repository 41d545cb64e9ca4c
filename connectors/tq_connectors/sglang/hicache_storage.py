"""TQHiCacheStorage: SGLang's hierarchical cache on tq-store, as its `dynamic` storage backend."""

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from tq_connectors.engine.interpreter import share_interpreter
from tq_connectors.sglang.engine_model import read_group, read_place
from tq_connectors.sglang.hicache_settings import read_settings
from tq_connectors.sglang.host_pages import HostPages, read_host_pool
from tq_connectors.sglang.page_setup import open_page_store
from tq_connectors.sglang.page_store import PageStore
from tq_connectors.sglang.rests import Rests
from tq_store.client import StoreClient
from tq_store.errors import ConfigError

logger = logging.getLogger(__name__)

_Call = TypeVar("_Call", bound=Callable[..., Any])


def _or_miss(miss: Callable[..., Any]) -> Callable[[_Call], _Call]:
    """What goes wrong in a call is logged, and its answer is a miss: SGLang's threads survive no exception.

    Args:
        miss: From the call's first argument to the answer that says nothing was there.
    """

    def decorate(call: _Call) -> _Call:
        @functools.wraps(call)
        def guarded(self: "TQHiCacheStorage", first: Any, *rest: Any, **named: Any) -> Any:
            try:
                return call(self, first, *rest, **named)
            except Exception:
                logger.exception("a call to the store failed in us, which is a miss")
                return miss(first)

        return guarded  # type: ignore[return-value]

    return decorate


class TQHiCacheStorage(HiCacheStorage):
    """SGLang's host pages as blocks of a tq-store server, one block a page of all layers.

    Args:
        storage_config: SGLang's; its `extra_config` holds `PageSettings` and the client's settings.
        named: Nothing today.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed; the engine then does not start.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, named: object = None) -> None:
        self._settings, connection = read_settings(storage_config.extra_config or {}, os.environ)
        self._config = storage_config
        if storage_config.is_mla_model:
            raise ConfigError("the store keeps keys and values of heads; this model has one latent (MLA)")
        if storage_config.should_split_heads:
            raise ConfigError("tp_lcm_size is not for the store; write tp_sizes")
        if storage_config.attn_cp_size > 1:
            raise ConfigError("the store takes whole pages; context parallelism cuts them between ranks")
        self._client = StoreClient(config=connection)
        self._metrics = StorageMetrics()
        self.rests = Rests()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take SGLang's host pool.

        Raises:
            ConfigError: A pool whose pages the codec in the settings cannot pack, or LoRA adapters that
                SGLang's hashes leave out; the engine does not start.
        """
        super().register_mem_pool_host(mem_pool_host)
        share_interpreter()
        place = read_place(
            self._settings.model or self._config.model_name or "",
            tp_rank=self._config.tp_rank,
            tp_size=self._config.tp_size,
            pp_rank=self._config.pp_rank,
            pp_size=self._config.pp_size,
        )
        self._pages: HostPages = read_host_pool(mem_pool_host, place.float8)
        self._store: PageStore = open_page_store(
            self._client, self._settings, self._pages.shape, place, group=read_group()
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: PoolName) -> None:
        """Take a further host pool.

        Raises:
            ConfigError: One of a model that has more than keys and values.
        """
        if host_pool_name != PoolName.KV:
            raise ConfigError(
                f"the store keeps keys and values; this model has a cache of {host_pool_name} besides"
            )

    @_or_miss(lambda keys: 0)
    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages the store has."""
        return self._store.count_present(keys)

    def exists(self, key: str) -> bool:
        """Whether the store has a page."""
        return self.batch_exists([key]) == 1

    @_or_miss(lambda keys: [False] * len(keys))
    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill pages of the host pool, up to the first that is missing, late or not sound."""
        return self._timed(
            self._store.load, keys, self._at(host_indices), self._metrics.prefetch_pgs, "prefetch_bandwidth"
        )

    @_or_miss(lambda keys: [False] * len(keys))
    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Save pages of the host pool; True where the store has the page afterwards."""
        return self._timed(
            self._store.save, keys, self._at(host_indices), self._metrics.backup_pgs, "backup_bandwidth"
        )

    @_or_miss(lambda keys: [None] * len(keys))
    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: object = None,
    ) -> list[torch.Tensor | None]:
        """Pages as flat tensors in the host pool's layout; None from the first on that is not there."""
        targets = target_locations or [self._pages.empty_flat() for _ in keys]
        views = [self._pages.view_flat(target) for target in targets]
        is_filled = self._store.load(keys, views.__getitem__)
        return [target if done else None for target, done in zip(targets, is_filled, strict=True)]

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: object = None
    ) -> torch.Tensor | None:
        """One page as a flat tensor in the host pool's layout."""
        (page,) = self.batch_get([key], None if target_location is None else [target_location])
        return page

    @_or_miss(lambda keys: False)
    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Save flat pages in the host pool's layout; True where the store has all of them afterwards."""
        views = [self._pages.view_flat(value) for value in values or ()]
        return all(self._store.save(keys, views.__getitem__))

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Save one flat page in the host pool's layout."""
        return value is not None and self.batch_set([key], [value])

    def clear(self) -> None:
        """Remove this process's pages from the store, those of other replicas of its kind among them."""
        self._store.purge()

    def get_stats(self) -> StorageMetrics:
        """What SGLang exports: pages and gigabytes a second of each batch since the last call."""
        metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    @property
    def counters(self) -> dict[str, int]:
        """What was moved and what went wrong since the start."""
        return self._store.count_everything()

    def close(self) -> None:
        """Cut the connection, and wait until nothing touches the host pool."""
        self._client.close()
        if hasattr(self, "_store"):  # SGLang closes what failed before its pool was registered, too
            self._store.close()

    def _at(self, host_indices: torch.Tensor) -> Callable[[int], torch.Tensor]:
        firsts = host_indices[:: self._pages.shape.page_tokens].tolist()
        return lambda position: self._pages.page(firsts[position])

    def _timed(
        self,
        move: Callable[[list[str], Callable[[int], torch.Tensor]], list[bool]],
        keys: list[str],
        page_at: Callable[[int], torch.Tensor],
        pages: list[int],
        bandwidth: str,
    ) -> list[bool]:
        started = time.perf_counter()
        is_done = move(keys, page_at)
        if self._config.enable_storage_metrics:
            pages.append(sum(is_done))
            gigabytes = sum(is_done) * self._pages.shape.page_bytes / 1e9
            getattr(self._metrics, bandwidth).append(gigabytes / (time.perf_counter() - started))
        return is_done
