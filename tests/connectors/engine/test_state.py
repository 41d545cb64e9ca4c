"""The file that gives engines their codec state, and what is refused."""

import pytest
import torch

from tq_connectors.codec import CacheGeometry, namespace_for
from tq_connectors.codec_state import CodecState, pack_state
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.state import STATE_VARIABLE, balance_of_layer, load_state
from tq_store.block import pack_block, parse_header
from tq_store.errors import ConfigError

GEOMETRY = CacheGeometry(num_layers=3, num_kv_heads=4, head_dim=64, kv_dtype="bfloat16")
NAMESPACE = namespace_for(layout_for("tq4", head_dim=64, num_kv_heads=4), GEOMETRY, model="m", revision="r")
STATE = CodecState(
    (torch.rand(3, 4, 64, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16().float()
)
BLOCK = pack_state(STATE, NAMESPACE, GEOMETRY)


def test_a_process_takes_the_layers_and_heads_that_it_has(tmp_path):
    file = tmp_path / "state"
    file.write_bytes(BLOCK)
    state = load_state({STATE_VARIABLE: str(file)})
    assert state is not None
    assert state.digest == STATE.digest
    balance = balance_of_layer(state, 1, num_layers=3, first_kv_head=2, num_kv_heads=2, head_dim=64)
    assert torch.equal(balance, STATE.key_balance[1, 2:])


def test_without_a_file_there_is_no_state():
    assert load_state({}) is None
    assert load_state({STATE_VARIABLE: ""}) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "starts with a header of 256 bytes"),
        (BLOCK[:-1], "payload has"),
        (BLOCK[:-1] + bytes([BLOCK[-1] ^ 1]), "payload differs"),
        (pack_block(parse_header(BLOCK), b"\xff" * (len(BLOCK) - 256)), "codec state is none"),
    ],
)
def test_a_file_that_holds_no_state_is_one_sentence(content, message, tmp_path):
    file = tmp_path / "state"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{STATE_VARIABLE} is .*{message}.*calibrate --save"):
        load_state({STATE_VARIABLE: str(file)})


@pytest.mark.parametrize(
    "other",
    [{"num_layers": 4}, {"head_dim": 128}, {"first_kv_head": 3}],
)
def test_a_state_of_another_model_is_refused(other):
    asked = {"num_layers": 3, "first_kv_head": 2, "num_kv_heads": 2, "head_dim": 64} | other
    with pytest.raises(ConfigError, match="codec state is of 3 layers, 4 KV heads and 64 channels"):
        balance_of_layer(STATE, 1, **asked)
