"""What an engine launches first touches nobody's pages, and reaches every way of attending."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tq_connectors.engine import warm_up
from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import Inflater
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.warm_up import compile_kernels

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=1)
CPU = torch.device("cpu")


def _noted(name: str, size_at: int, calls: list[tuple[str, int]]) -> Callable[..., None]:
    """A method of a layer that notes one dimension of its first tensor."""
    whole = getattr(PagedAttention, name)

    def call(self: PagedAttention, first: torch.Tensor, *rest: Any, **named: Any) -> None:
        calls.append((name, first.shape[size_at]))
        whole(self, first, *rest, **named)

    return call


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_every_way_of_attending_is_tried(
    is_dense: bool, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(warm_up, "_LONG_TOKENS", 256)
    calls: list[tuple[str, int]] = []
    for name, size_at in (("write", 0), ("decode", 1), ("extend", 0)):
        monkeypatch.setattr(PagedAttention, name, _noted(name, size_at, calls))

    def dense(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(("dense", len(query)))
        return query, torch.zeros(query.shape[1], len(query))

    sinks = torch.randn(2, 3, 4, 1, 64).bfloat16() if has_sinks else (None, None)
    kept = [side if side is None else side.clone() for side in sinks]
    attention = PagedAttention(layout=LAYOUT, softmax_scale=0.1, sink_keys=sinks[0], sink_values=sinks[1])
    compile_kernels(
        attention,
        num_query_heads=2,
        dtype=torch.float32,
        device=CPU,
        inflater=Inflater(LAYOUT, dtype=torch.float32, device=CPU, max_tokens=1024) if is_dense else None,
        dense=dense if is_dense else None,
        workspace=None,
    )
    assert {size for name, size in calls if name == "write"} == {640, 16}
    assert {size for name, size in calls if name == "decode"} == {1, 4, 16}
    assert [size for name, size in calls if name == "extend"] == [65] + [256] * (not is_dense)
    assert [size for name, size in calls if name == "dense"] == [256] * is_dense
    for side, before in zip(sinks, kept, strict=True):
        assert side is before or torch.equal(side, before)


def test_what_cannot_be_compiled_stops_no_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: PagedAttention, *rest: Any, **named: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(PagedAttention, "write", fail)
    compile_kernels(
        PagedAttention(layout=LAYOUT, softmax_scale=0.1),
        num_query_heads=2,
        dtype=torch.float32,
        device=CPU,
        inflater=None,
        dense=None,
        workspace=None,
    )
    assert "no compiler here" in caplog.text
