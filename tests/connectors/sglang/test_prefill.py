"""A batch of everything at once attends as its sequences alone would."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from tq_connectors.engine import inflate
from tq_connectors.engine import short_chunks as engine_short_chunks
from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.layouts import layout_for
from tq_connectors.engine.short_chunks import Chunk, short_chunks
from tq_connectors.sglang import segments
from tq_connectors.sglang.fresh import FLASH_VARIABLE, flash_attention_3
from tq_connectors.sglang.prefill import Prefill
from tq_connectors.sglang.segments import cut_into_segments
from tq_connectors.sglang.steps import Batch
from tq_kernels.quantize import quantize_slots

P, HEADS, KV_HEADS, DIM = 64, 4, 2, 64
LAYOUT = layout_for("tq4", head_dim=DIM, num_kv_heads=KV_HEADS, page_tokens=P)
CPU = torch.device("cpu")
SCALE = 0.125
PREFIXES, NEW = [0, 0, 64, 70], [30, 5, 20, 1]


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have tests of their own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


class FreshAttention:
    """Takes what FlashAttention 3 takes, and notes it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        max_query: int,
        max_keys: int,
        out: torch.Tensor | None = None,
        return_softmax_lse: bool = False,
        **named: Any,
    ) -> Any:
        starts = query_starts.tolist()
        self.calls.append(named | {"longest": (max_query, max_keys), "starts": starts})
        if return_softmax_lse:
            assert (starts, key_starts.tolist()) == ([0, len(query)], [0, len(keys)])
            lse = torch.zeros(query.shape[1], len(query))  # of use to several runs alone
            return exact(query, keys, values, len(keys) - len(query)), lse
        assert torch.equal(query_starts, key_starts)
        assert out is not None
        out.copy_(torch.cat([exact(query[a:b], keys[a:b], values[a:b], 0) for a, b in pairwise(starts)]))
        return out


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
    """Causal attention of queries that stand at positions first and on."""
    keys, values = (side.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for side in (keys, values))
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * SCALE
    later = torch.arange(keys.shape[1]) > first + torch.arange(len(query))[:, None]
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def attended(prefill: Prefill, attention: PagedAttention) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Output of a batch with two tokens of padding, the raw tensors, and the pool."""
    generator = torch.Generator().manual_seed(5)
    pages = torch.zeros(16, LAYOUT.page_bytes, dtype=torch.uint8)
    table = torch.arange(1, 9, dtype=torch.int32).view(4, 2)
    past = torch.randn(2, 4, 2 * P, KV_HEADS, DIM, generator=generator)
    for row, prefix in enumerate(PREFIXES):
        slots = (table[row].long()[:, None] * P + torch.arange(P)).flatten()[:prefix]
        quantize_slots(past[0, row, :prefix], past[1, row, :prefix], slots, pages, LAYOUT)
    tokens = sum(NEW) + 2
    query = torch.randn(tokens, HEADS, DIM, generator=generator)
    keys, values = torch.randn(2, tokens, KV_HEADS, DIM, generator=generator)
    for row, first, own in ((2, 35, slice(64, 84)), (3, 55, slice(70, 71))):
        slots = (table[row].long()[:, None] * P + torch.arange(P)).flatten()[own]
        new = slice(first, first + len(slots))
        quantize_slots(keys[new], values[new], slots, pages, LAYOUT)
    lengths = torch.tensor([a + b for a, b in zip(PREFIXES, NEW, strict=True)], dtype=torch.int32)
    nobody = torch.full((tokens,), -1, dtype=torch.int32)
    batch = Batch(
        block_table=table,
        lengths=lengths,
        query_start=torch.tensor([0, 30, 35, 55, 56], dtype=torch.int32),
        slots=nobody.long(),
        seed_pages=nobody,
        sink_slots=nobody,
        sink_rows=nobody[:4],
        segments=cut_into_segments(PREFIXES, NEW),
        short=short_chunks(
            [
                Chunk(seq=row, first_token=first, num_new=new, prefix_len=prefix)
                for row, (first, new, prefix) in enumerate(zip([0, 30, 35, 55], NEW, PREFIXES, strict=True))
            ],
            table,
            nobody[:4],
            LAYOUT,
            num_query_heads=HEADS,
        ),
    )
    out = torch.full_like(query, torch.nan)
    prefill.attend(attention, query, keys, values, pages, batch, out)
    return out, past, (query, keys, values)


def test_long_chunks_over_a_prefix_are_dense_where_the_engine_has_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inflate, "SMALLEST_CHUNK", 20)
    for module in (segments, engine_short_chunks):
        monkeypatch.setattr(module, "LONGEST_CHUNK", 1)
    fresh, attention = FreshAttention(), PagedAttention(layout=LAYOUT, softmax_scale=SCALE)
    dense = Prefill(LAYOUT, max_tokens=256, dtype=torch.float32, device=CPU, fresh=fresh)
    direct = Prefill(LAYOUT, max_tokens=256, dtype=torch.float32, device=CPU, fresh=None)
    assert torch.allclose(attended(dense, attention)[0], attended(direct, attention)[0], atol=1e-4)
    assert [call["longest"] for call in fresh.calls] == [(30, 30), (20, 84)]


@pytest.mark.parametrize("with_fresh", [False, True])
def test_every_kind_of_sequence_in_one_batch(*, with_fresh: bool) -> None:
    fresh = FreshAttention() if with_fresh else None
    prefill = Prefill(LAYOUT, max_tokens=256, dtype=torch.float32, device=CPU, fresh=fresh)
    out, past, (query, keys, values) = attended(prefill, PagedAttention(layout=LAYOUT, softmax_scale=SCALE))
    starts = [0, 30, 35, 55, 56]
    for row, (prefix, a, b) in enumerate(zip(PREFIXES, starts, starts[1:], strict=False)):
        wanted = exact(
            query[a:b],
            torch.cat((past[0, row, :prefix], keys[a:b])),
            torch.cat((past[1, row, :prefix], values[a:b])),
            prefix,
        )
        error = (out[a:b] - wanted).norm() / wanted.norm()
        assert error < (0.2 if prefix else 1e-4)
    assert not out[56:].any()
    if fresh:
        (call,) = fresh.calls
        assert call["starts"] == [0, 30, 35]
        assert call["longest"] == (30, 30)
        assert (call["causal"], call["softmax_scale"]) == (True, SCALE)
        assert (call["window_size"], call["softcap"]) == ((-1, -1), 0.0)


def test_a_window_counts_the_positions_before_a_query() -> None:
    fresh = FreshAttention()
    attention = PagedAttention(layout=LAYOUT, softmax_scale=SCALE, sliding_window=9, softcap=30.0)
    attended(Prefill(LAYOUT, max_tokens=256, dtype=torch.float32, device=CPU, fresh=fresh), attention)
    assert fresh.calls[0]["window_size"] == (8, 0)
    assert fresh.calls[0]["softcap"] == 30.0


def test_a_batch_of_nothing_is_zeros() -> None:
    batch = Batch(
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        lengths=torch.zeros(1, dtype=torch.int32),
        query_start=torch.zeros(2, dtype=torch.int32),
        slots=torch.zeros(1, dtype=torch.int64),
        seed_pages=torch.zeros(1, dtype=torch.int32),
        sink_slots=torch.zeros(1, dtype=torch.int32),
        sink_rows=torch.zeros(1, dtype=torch.int32),
    )
    out = torch.full((1, HEADS, DIM), torch.nan)
    side = torch.zeros(1, KV_HEADS, DIM)
    Prefill(LAYOUT, max_tokens=64, dtype=torch.float32, device=CPU, fresh=None).attend(
        PagedAttention(layout=LAYOUT, softmax_scale=SCALE), out, side, side, torch.empty(0), batch, out
    )
    assert not out.any()


def test_flash_attention_is_not_tried_where_it_is_switched_off() -> None:
    heads = (8, 2, 64, torch.bfloat16)
    assert flash_attention_3(*heads, torch.device("cuda"), {FLASH_VARIABLE: "off"}) is None
    assert flash_attention_3(*heads, CPU, {}) is None
