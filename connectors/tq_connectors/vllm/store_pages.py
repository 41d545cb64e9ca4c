"""Pages of one rank: what they become on its device, and its view of them in the store."""

from tq_connectors.codec import CacheGeometry
from tq_connectors.parts import Division, shard_of
from tq_connectors.prefix_cache import PrefixCache
from tq_connectors.store_guard import StoreGuard
from tq_connectors.vllm.plan import OffloadPlan
from tq_connectors.vllm.rows import PageRows
from tq_store.client import StoreClient
from tq_store.errors import ConfigError


def rank_cache(client: StoreClient, plan: OffloadPlan, *, rank: int, most_ranks: int) -> PrefixCache:
    """A rank's view of pages in the store, which is left alone while it fails.

    Args:
        client: Connection to the store; owned by the caller.
        plan: For the engine.
        rank: Tensor-parallel rank.
        most_ranks: Tensor-parallel ranks of the widest engine that shares the pages; 0 for this one's.

    Raises:
        ConfigError: The engine's cache is none of keys and values that pages hold.
    """
    if not isinstance(plan.rows, PageRows):
        raise ConfigError(
            "TQStoreConnector moves packed pages: choose a preset of ours for a cache in bf16 or fp16, or "
            "`TQStoreTier`, which moves any bytes"
        )
    rows, namespace = plan.rows, plan.namespace
    geometry = CacheGeometry(
        num_layers=rows.num_layers,
        num_kv_heads=rows.layout.num_kv_heads,
        head_dim=rows.layout.head_dim,
        kv_dtype=namespace.kv_dtype,
    )
    return PrefixCache(
        client,
        rows.layout,
        geometry,
        model=namespace.model,
        revision=namespace.revision,
        division=Division.for_ranks(geometry, tp_sizes=[most_ranks or rows.tp_size]),
        shard=shard_of(geometry, tp_rank=rank, tp_size=rows.tp_size),
        guard=StoreGuard(),
    )
