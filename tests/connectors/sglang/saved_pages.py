"""Pages of a small model, and replicas that save them."""

from collections.abc import Callable

import torch
from connectors.sglang.host_pool import HostMemory

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang.hicache_settings import PageSettings
from tq_connectors.sglang.host_pages import HostPages, read_host_pool
from tq_connectors.sglang.page_setup import Place, open_page_store
from tq_connectors.sglang.page_store import PageStore
from tq_store.client import StoreClient

HASHES = [f"{number:064x}" for number in range(4)]
GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, head_dim=32, kv_dtype="bfloat16")
PLACE = Place(model="model", geometry=GEOMETRY, layers=range(2))
SETTINGS = PageSettings(revision="v1", codec="none", device="cpu")


def pool_of(
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int | None = None,
    dim: int = 32,
    heads: int = 2,
    layers: int = 2,
) -> HostPages:
    sizes = {"num_pages": 4, "page_size": 16, "layers": layers, "heads": heads, "dim": dim}
    pool = HostMemory("page_first", **sizes, dtype=dtype)
    return read_host_pool(pool if seed is None else pool.fill(seed))


def page_at(pages: HostPages) -> Callable[[int], torch.Tensor]:
    return lambda position: pages.page(16 * position)


def save(
    client: StoreClient, pages: HostPages, settings: PageSettings = SETTINGS, place: Place = PLACE
) -> PageStore:
    store = open_page_store(client, settings, pages.shape, place)
    assert store.save(HASHES, page_at(pages)) == [True] * 4
    return store
