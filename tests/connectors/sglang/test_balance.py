"""What a process divides the keys of its layers by."""

import logging
from pathlib import Path

import pytest
import torch

from tq_connectors.codec_state import CodecState
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.state import STATE_VARIABLE
from tq_connectors.sglang import balance
from tq_store.errors import ConfigError


def balance_of(environment: dict[str, str], tp_rank: int = 0, tp_size: int = 1) -> torch.Tensor | None:
    layout = layout_for("tq4", head_dim=64, num_kv_heads=max(1, 4 // tp_size))
    return balance.key_balance(
        environment,
        layout,
        layers=range(1, 3),
        num_model_layers=3,
        total_kv_heads=4,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def test_no_state_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert balance_of({}) is None
    assert STATE_VARIABLE in caplog.text


def test_layers_and_heads_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (torch.arange(3 * 4 * 64).view(3, 4, 64) % 16 + 1).float()
    monkeypatch.setattr(balance, "load_state", lambda _: CodecState(numbers))
    whole = balance_of({})
    assert whole is not None
    assert torch.equal(whole, numbers[1:3])
    half = balance_of({}, tp_rank=1, tp_size=2)
    assert half is not None
    assert torch.equal(half, numbers[1:3, 2:4])
    repeated = balance_of({}, tp_rank=5, tp_size=8)
    assert repeated is not None
    assert torch.equal(repeated, numbers[1:3, 2:3])


def test_a_file_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=STATE_VARIABLE):
        balance_of({STATE_VARIABLE: str(tmp_path / "absent")})
