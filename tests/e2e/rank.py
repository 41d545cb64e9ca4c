"""One rank of an engine in a process of its own: `python -m e2e.rank ADDRESS`, a JSON request a line.

It holds what its shard of one made-up model holds: saves that, and tells what it loads as SHA-256 digests.
"""

import hashlib
import json
import sys
from typing import Any, NamedTuple

from connectors.ranks import ModelPages, geometry_of, stages

from tq_connectors.parts import Division, Shard, shard_of
from tq_connectors.prefix_cache import PrefixCache
from tq_kernels.layout import PageLayout
from tq_kernels.spec import preset
from tq_store.client import StoreClient
from tq_store.config import ClientConfig

GEOMETRY = geometry_of(64, 4, head_dim=64)
LAYOUT = PageLayout(spec=preset("raw"), head_dim=64, num_kv_heads=4, page_tokens=64)
NUM_PAGES = 3
PAGES = [ModelPages(GEOMETRY, LAYOUT.section_bytes, seed=seed) for seed in range(NUM_PAGES)]
DIVISION = Division.for_ranks(GEOMETRY, tp_sizes=[1, 2, 4], layer_splits=[[64], [40, 24]])
"""Eight parts of a page of 4 MiB: four of 640 KiB each, then four of 384 KiB."""
PATIENT = ClientConfig(lookup_timeout_s=30, transfer_timeout_s=30, max_attempts=10, backoff_s=0.05)


class Rank(NamedTuple):
    """Which one, of how many, in which pipeline stage of how many layers."""

    tp_rank: int = 0
    tp_size: int = 1
    layer_split: tuple[int, ...] = (GEOMETRY.num_layers,)
    stage: int = 0

    @property
    def shard(self) -> Shard:
        layers = stages([*self.layer_split])[self.stage]
        return shard_of(GEOMETRY, tp_rank=self.tp_rank, tp_size=self.tp_size, layers=layers)

    @property
    def digests(self) -> list[str]:
        """Of the pages that it holds."""
        return [hashlib.sha256(pages.of(self.shard.part)).hexdigest() for pages in PAGES]


def engine(tp_size: int, layer_split: tuple[int, ...] = Rank().layer_split) -> list[Rank]:
    """All its ranks."""
    return [
        Rank(rank, tp_size, layer_split, stage)
        for stage in range(len(layer_split))
        for rank in range(tp_size)
    ]


def work(client: StoreClient, salt: str, action: str, rank: Rank, is_divided: bool) -> Any:
    cache = PrefixCache(
        client,
        LAYOUT,
        GEOMETRY,
        model="m",
        revision="1",
        salt=salt,
        division=DIVISION if is_divided else None,
        shard=rank.shard,
    )
    try:
        keys = cache.keys(range(NUM_PAGES * LAYOUT.page_tokens))
        if action == "load":
            return [hashlib.sha256(pages).hexdigest() for pages in cache.load(keys)]
        for key, pages in zip(keys, PAGES, strict=True):
            cache.save(key, pages.of(rank.shard.part))
        cache.saves.flush(PATIENT.transfer_timeout_s)
        return cache.saves.saved_blocks
    finally:
        cache.close()


def main(address: str) -> None:
    with StoreClient(address, config=PATIENT) as client:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            salt, action, rank, is_divided = json.loads(line)
            print(json.dumps(work(client, salt, action, Rank(*rank), is_divided)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
