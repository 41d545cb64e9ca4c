"""One model's view of the store: what is asked for, and what is dropped."""

import pytest

from tq_connectors.codec import CacheGeometry, pack_pages
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels import PageLayout, preset
from tq_store.results import PutOutcome

LAYOUT = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, head_dim=64, kv_dtype="float32")
PAGES = bytes(2 * LAYOUT.page_bytes)


class Store:
    """Has the first `num_hits` pages of whatever it is asked for."""

    def __init__(self, num_hits: int) -> None:
        self.num_hits = num_hits
        self.asked: list[int] = []

    def lookup(self, keys):
        return self.num_hits

    def get(self, keys):
        self.asked.append(len(keys))
        return ((index, pack_pages(LAYOUT, 2, key, PAGES)) for index, key in enumerate(keys))

    def put(self, blocks):
        return [PutOutcome.STORED] * len(blocks)


@pytest.mark.parametrize("num_hits", [0, 1, 3, 5])
def test_only_promised_pages_are_asked_for(num_hits):
    store = Store(num_hits)
    cache = PrefixCache(store, LAYOUT, GEOMETRY, model="m", revision="1")
    assert list(cache.load(cache.keys(range(80)))) == [PAGES] * num_hits
    assert store.asked == [num_hits]
    cache.close()


def test_the_save_queue_takes_no_more_than_its_bytes():
    cache = PrefixCache(Store(0), LAYOUT, GEOMETRY, model="m", revision="1", save_queue_bytes=len(PAGES))
    assert not cache.save(cache.keys(range(16))[0], PAGES)  # a block has a header too
    cache.close()
    assert cache.saves.dropped_blocks == 1
