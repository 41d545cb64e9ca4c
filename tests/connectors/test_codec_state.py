"""Replicas agree on one codec state through a real store: the first writer wins, damage is told."""

import threading

import pytest
import torch
from store.running_server import running_server

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import (
    CodecState,
    agree_on_state,
    pack_state,
    state_key,
    unpack_state,
)
from tq_kernels import PageLayout, preset
from tq_store.block import HEADER_BYTES, pack_block, parse_header, verify_block
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, IdentityMismatch, InvalidHeader

GEOMETRY = CacheGeometry(num_layers=3, num_kv_heads=2, head_dim=64, kv_dtype="bfloat16")
LAYOUT = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2)
NAMESPACE = namespace_for(LAYOUT, GEOMETRY, model="m", revision="1")


def state(seed: int) -> CodecState:
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(3, 2, 64, generator=generator)
    return CodecState(logs.exp().clamp(1 / 64, 64).bfloat16().float())


def test_a_state_survives_its_block():
    block = pack_state(state(0), NAMESPACE, GEOMETRY)
    verify_block(block, state_key(NAMESPACE))
    again = unpack_state(block, NAMESPACE, GEOMETRY)
    assert torch.equal(again.key_balance, state(0).key_balance)
    assert again.digest == state(0).digest != state(1).digest
    assert len(block) == HEADER_BYTES + 3 * 2 * 64 * 2


def test_replicas_that_propose_at_once_end_with_one_state():
    agreed = []
    with running_server() as server:

        def replica(seed):
            with StoreClient(server.address) as client:
                agreed.append(agree_on_state(client, NAMESPACE, GEOMETRY, lambda: state(seed)).digest)

        threads = [threading.Thread(target=replica, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with StoreClient(server.address) as client:
            late = agree_on_state(client, NAMESPACE, GEOMETRY, lambda: pytest.fail("there is one"))
    assert len(agreed) == 6
    assert set(agreed) == {late.digest}
    assert late.digest in {state(seed).digest for seed in range(6)}


def test_without_a_proposal_or_room_there_is_none():
    with running_server() as server, StoreClient(server.address) as client:
        assert agree_on_state(client, NAMESPACE, GEOMETRY, lambda: None) is None
    with running_server(memory_budget_bytes=500) as server, StoreClient(server.address) as client:
        assert agree_on_state(client, NAMESPACE, GEOMETRY, lambda: state(0)) is None


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), 128.0, 1 / 128])
def test_numbers_that_no_balance_has_are_refused(number):
    spoiled = state(0).key_balance.clone()
    spoiled[1, 1, 1] = number
    with pytest.raises(ValueError, match="bfloat16 numbers from"):
        CodecState(spoiled)
    info = parse_header(pack_state(state(0), NAMESPACE, GEOMETRY))
    payload = spoiled.bfloat16().view(torch.int16).numpy().tobytes()
    block = pack_block(info, payload)
    with running_server() as server, StoreClient(server.address) as client:
        client.put([(state_key(NAMESPACE), block)])
        with pytest.raises(InvalidHeader, match="is none"):
            agree_on_state(client, NAMESPACE, GEOMETRY, lambda: state(0))


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="on the CPU"):
        CodecState(torch.ones(2, 64))
    other = CacheGeometry(num_layers=4, num_kv_heads=2, head_dim=64, kv_dtype="bfloat16")
    with pytest.raises(IdentityMismatch, match="no codec state of this model"):
        unpack_state(pack_state(state(0), NAMESPACE, GEOMETRY), NAMESPACE, other)
    with pytest.raises(BlockFormatError):
        unpack_state(b"noise", NAMESPACE, GEOMETRY)


def test_layers_make_a_state():
    layers = list(state(0).key_balance)
    assert CodecState.of_layers(layers).digest == state(0).digest
