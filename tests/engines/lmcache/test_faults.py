"""Our faults between LMCache's adapter and the store: whatever is struck, bytes are right or a miss."""

import random

import pytest
import torch
from engines.lmcache.objects import Controller, make_adapter, object_key, plugin
from faults.proxy import Kind, proxied, random_fault

SERDE = {"type": "tq", "preset": "tq4", "num_kv_heads": 2, "head_dim": 64}
CHUNKS = [
    torch.randn(2, 2, 256, 128, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(4)
]
KEYS = [object_key(number) for number in range(4)]
WAYS = {"connect_timeout": "1", "lookup_timeout": "1", "transfer_timeout": "1", "max_attempts": 1}


@pytest.mark.parametrize("serde", [None, SERDE])
@pytest.mark.parametrize("kind", Kind)
def test_what_is_struck_is_right_or_a_miss(server, client, salt, kind, serde):
    extra = {} if serde is None else {"serde": serde}
    identity = {"salt": salt, "codec": "none" if serde is None else "serde:tq4"}
    straight = Controller(make_adapter(plugin(server.address, **identity) | extra))
    assert straight.store(KEYS, CHUNKS)
    expected = straight.load(KEYS, CHUNKS[0])
    straight.adapter.close()
    rng = random.Random(f"{kind} {serde}")
    size = CHUNKS[0].nbytes // (1 if serde is None else 4)
    struck = 0
    for _ in range(4):
        fault = random_fault(rng, kind, upward_bytes=2000, downward_bytes=4 * size)
        with proxied(server.address, fault) as proxy:
            controller = Controller(make_adapter(plugin(proxy.address, **identity, **WAYS) | extra))
            for found, right in zip(controller.load(KEYS, CHUNKS[0]), expected, strict=True):
                assert found is None or torch.equal(found, right)
            controller.find(KEYS)
            controller.store([object_key(9)], CHUNKS[:1])
            controller.adapter.close()
            struck += proxy.struck
    assert struck
