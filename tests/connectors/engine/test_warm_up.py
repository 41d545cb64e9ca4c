"""What an engine launches first touches nobody's pages, and reaches every way of attending."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tq_connectors.engine import warm_up
from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import Inflater
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.short_chunks import ROWS
from tq_connectors.engine.warm_up import compile_kernels
from tq_kernels._page_shape import page_shape
from tq_kernels.decode_plan import MAX_ROWS, Machine, plan_decode
from tq_kernels.quantize_plan import plan_quantize

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=1)
CPU = torch.device("cpu")


def _noted(name: str, size_at: int, calls: list[tuple[str, int]]) -> Callable[..., None]:
    """A method of a layer that notes one dimension of its first tensor."""
    whole = getattr(PagedAttention, name)

    def call(self: PagedAttention, first: torch.Tensor, *rest: Any, **named: Any) -> None:
        calls.append((name, first.shape[size_at]))
        whole(self, first, *rest, **named)

    return call


def test_kernels_are_launched_where_they_cannot_be_compiled_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise TypeError("no such argument")

    launched: list[PagedAttention] = []
    monkeypatch.setattr(warm_up, "compile_ahead", fail)
    monkeypatch.setattr(warm_up, "_launch", lambda attention, *_: launched.append(attention))
    attention = PagedAttention(layout=LAYOUT, softmax_scale=0.1)
    compile_kernels(
        [(attention, None)], num_query_heads=1, dtype=torch.float32, device=CPU, inflater=None, workspace=None
    )
    assert launched == [attention]


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_every_way_of_attending_is_tried(
    is_dense: bool, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(warm_up, "_PREFIX_PAGES", (1, 4))
    monkeypatch.setattr(warm_up, "_MANY_CHUNKS", (2, 3))
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
    state = torch.get_rng_state()
    attention = PagedAttention(layout=LAYOUT, softmax_scale=0.1, sink_keys=sinks[0], sink_values=sinks[1])
    compile_kernels(
        [(attention, dense if is_dense else None)] * 2,
        num_query_heads=2,
        dtype=torch.float32,
        device=CPU,
        inflater=Inflater(LAYOUT, dtype=torch.float32, device=CPU, max_tokens=1024) if is_dense else None,
        workspace=None,
    )
    assert [size for name, size in calls if name == "write"] == [640, 16, 1] * 2  # compiled, then launched
    assert {size for name, size in calls if name == "decode"} == {1, 4, 16}
    extended = [65, 65, 255, 255] if is_dense else [65] * 3 + [255] * 3 + [256] * 3
    assert [size for name, size in calls if name == "extend"] == extended * 2
    assert [size for name, size in calls if name == "dense"] == [256, 256] * 2 * is_dense
    assert torch.equal(torch.get_rng_state(), state)
    for side, before in zip(sinks, kept, strict=True):
        assert side is before or torch.equal(side, before)


def test_kernels_of_many_tokens_and_of_few_are_tried() -> None:
    for hopper in (False, True):
        plans = [
            plan_quantize(count, page_shape(LAYOUT), hopper_pages=hopper) for count in warm_up._WRITTEN_TOKENS
        ]
        assert [plan.variant for plan in plans] == ["hopper_pages" if hopper else "pages", "append"]


def test_a_layer_of_every_window_and_cap_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int | None, float | None]] = []

    def note(self: PagedAttention, *given: Any, **named: Any) -> None:
        tried.append((self.sliding_window, self.softcap))

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("write", "decode", "extend"):
        monkeypatch.setattr(PagedAttention, name, note)
    kinds = [(None, None), (100, None), (None, 30.0), (100, 30.0)]
    layers = [PagedAttention(layout=LAYOUT, softmax_scale=0.1, sliding_window=w, softcap=c) for w, c in kinds]
    compile_kernels(
        [(layer, None) for layer in (*layers, *layers)],
        num_query_heads=2,
        dtype=torch.float32,
        device=CPU,
        inflater=None,
        workspace=None,
    )
    assert list(dict.fromkeys(tried)) == kinds
    assert len({tried.count(kind) for kind in kinds}) == 1  # however many layers are of a kind


def test_what_cannot_be_compiled_stops_no_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: PagedAttention, *rest: Any, **named: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(PagedAttention, "write", fail)
    compile_kernels(
        [(PagedAttention(layout=LAYOUT, softmax_scale=0.1), None)],
        num_query_heads=2,
        dtype=torch.float32,
        device=CPU,
        inflater=None,
        workspace=None,
    )
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize(
    "machine",
    [
        Machine(capability=(9, 0), num_processors=132, gluon=True),
        Machine(capability=(8, 0), num_processors=108),
    ],
)
@pytest.mark.parametrize("rows", ROWS)
def test_prefixes_of_all_lengths_are_merged_as_one_that_was_tried(machine: Machine, rows: int) -> None:
    layout = layout_for("tq4", head_dim=128, num_kv_heads=8)

    def merged_at_once(pages: int, num_seqs: int = 1) -> int:
        """Merges of a power of two of parts share a kernel, those of 128 and more as well."""
        plan = plan_decode(layout, machine, num_seqs=num_seqs, num_query_heads=32, max_pages=pages, rows=rows)
        return min(128, 1 << (plan.num_splits - 1).bit_length())

    tried = {merged_at_once(pages + 1) for pages in warm_up._PREFIX_PAGES}
    if rows == MAX_ROWS:
        tried |= {merged_at_once(2, count) for count in warm_up._MANY_CHUNKS}
    assert {merged_at_once(pages) for pages in range(2, 600)} <= tried
    if rows == MAX_ROWS:
        assert {merged_at_once(pages, seqs) for pages in range(2, 65) for seqs in range(1, 65)} <= tried


@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_decodes_of_all_sizes_have_registers_of_one_that_was_tried(
    num_kv_heads: int, page_tokens: int
) -> None:
    """A decode's kernel is that of chunks of one token."""
    layout = layout_for("tq4", head_dim=128, num_kv_heads=num_kv_heads, page_tokens=page_tokens)
    machine = Machine(capability=(9, 0), num_processors=132, gluon=True)

    def registers(pages: int, num_seqs: int) -> int:
        heads = 4 * num_kv_heads
        return plan_decode(
            layout, machine, num_seqs=num_seqs, num_query_heads=heads, max_pages=pages
        ).num_registers

    tried = {registers(pages + 1, 1) for pages in warm_up._PREFIX_PAGES}
    tried |= {registers(2, count) for count in warm_up._MANY_CHUNKS}
    assert {registers(pages, seqs) for pages in range(1, 257) for seqs in (1, 4, 8, 16, 32, 64)} == tried
