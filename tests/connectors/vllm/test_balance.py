"""What a process divides the keys of a group's layers by."""

import logging

import pytest
import torch

from tq_connectors.codec_state import CodecState
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.state import STATE_VARIABLE
from tq_connectors.vllm import balance
from tq_store.errors import ConfigError

NUMBERS = (torch.arange(3 * 4 * 64).view(3, 4, 64) % 16 + 1).float()


def balances(environment, layers=(1, 2), tp_rank=0, tp_size=1):
    layout = layout_for("tq4", head_dim=64, num_kv_heads=max(1, 4 // tp_size))
    return balance.key_balances(
        environment,
        layout,
        layers,
        num_model_layers=3,
        total_kv_heads=4,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def test_no_state_is_said_in_a_line(caplog):
    with caplog.at_level(logging.INFO, logger="tq_connectors"):
        assert balances({}) == [None, None]
    assert STATE_VARIABLE in caplog.text


def test_layers_and_heads_are_those_of_the_process_and_drafts_have_none(monkeypatch):
    monkeypatch.setattr(balance, "load_state", lambda _: CodecState(NUMBERS))
    first, second, draft = balances({}, (2, 0, 3))
    assert torch.equal(first, NUMBERS[2])
    assert torch.equal(second, NUMBERS[0])
    assert draft is None
    assert torch.equal(balances({}, tp_rank=1, tp_size=2)[0], NUMBERS[1, 2:4])
    assert torch.equal(balances({}, tp_rank=5, tp_size=8)[0], NUMBERS[1, 2:3])


def test_a_file_that_is_none_stops_the_start(tmp_path):
    with pytest.raises(ConfigError, match=STATE_VARIABLE):
        balances({STATE_VARIABLE: str(tmp_path / "absent")})
