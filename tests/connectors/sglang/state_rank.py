"""One of two ranks that open their page stores: prints the codec state that its pages are made with.

Usage: python -m connectors.sglang.state_rank RANK RENDEZVOUS ADDRESS
"""

import dataclasses
import sys

import torch.distributed as dist
from connectors.sglang.saved_pages import PLACE, SETTINGS, pool_of

from tq_connectors.sglang.page_setup import open_page_store
from tq_store.client import StoreClient
from tq_store.config import ClientConfig


def main() -> None:
    rank, (rendezvous, address) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    place = dataclasses.replace(PLACE, tp_rank=rank, tp_size=2)
    settings = dataclasses.replace(SETTINGS, codec="tq3")
    config = ClientConfig(address=address, lookup_timeout_s=2, transfer_timeout_s=2)
    with StoreClient(config=config) as client:
        store = open_page_store(client, settings, pool_of(heads=1).shape, place, {}, group=dist.group.WORLD)
        balance = store.codec._balance
        print(store._names.namespace.codec_state, None if balance is None else balance.flatten()[0].item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
