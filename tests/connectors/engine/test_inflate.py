"""A chunk over an inflated prefix is attention over what the pages hold, in one run or in several."""

import pytest
import torch

from tq_connectors.engine import inflate
from tq_connectors.engine.attention import PagedAttention
from tq_connectors.engine.inflate import Inflater
from tq_connectors.engine.layouts import layout_for
from tq_kernels import reference

LAYOUT = layout_for("tq4", head_dim=64, num_kv_heads=2)
P = LAYOUT.page_tokens
CPU = torch.device("cpu")
SCALE = 0.125
NUM_NEW = 256


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an engine's library does."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, keys.float().repeat_interleave(group, 1)) * SCALE
    if causal:
        last = torch.arange(len(keys) - len(query), len(keys))
        scores.masked_fill_(torch.arange(len(keys)) > last[:, None], -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float().repeat_interleave(group, 1))
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("sinks", [None, 1, -1])
@pytest.mark.parametrize(
    ("prefix_len", "room"), [(2 * P, 1024), (3 * P + 9, 1024), (3, 1024), (9 * P + 5, 5 * P), (9 * P, 5 * P)]
)
def test_a_chunk_sees_the_prefix_that_pages_hold(
    prefix_len: int, room: int, sinks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate, "INFLATED_TOKENS", room)
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 12 * P, 2, 64, generator=generator).bfloat16()
    balance = torch.rand(2, 64, generator=generator) + 0.5
    packed = reference.quantize(keys, values, LAYOUT, key_balance=balance)
    place = torch.randperm(12, generator=generator).to(torch.int32)
    pages = torch.empty_like(packed)
    pages[place.long()] = packed
    held_keys, held_values = (
        side[:prefix_len].bfloat16() for side in reference.dequantize(packed, LAYOUT, key_balance=balance)
    )
    kept = torch.randn(2, 3, 4, 2, 64, generator=generator).bfloat16()
    sink_row = None
    arguments = {}
    if sinks is not None:
        sink_row = torch.tensor([sinks], dtype=torch.int32)
        arguments = {"sink_keys": kept[0], "sink_values": kept[1]}
        if sinks >= 0:
            held_keys[:4], held_values[:4] = kept[0, sinks, :prefix_len], kept[1, sinks, :prefix_len]
    attention = PagedAttention(layout=LAYOUT, softmax_scale=SCALE, key_balance=balance, **arguments)
    inflater = Inflater(LAYOUT, dtype=torch.bfloat16, device=CPU, max_tokens=12 * P)
    query = torch.randn(NUM_NEW, 4, 64, generator=generator)
    new_keys, new_values = torch.randn(2, NUM_NEW, 2, 64, generator=generator).bfloat16()
    out = torch.empty_like(query)
    assert inflater.serves(attention, NUM_NEW, prefix_len)
    inflater.attend(
        attention, dense, query, new_keys, new_values, pages, place, prefix_len, sink_row=sink_row, out=out
    )
    expected, _ = dense(
        query, torch.cat((held_keys, new_keys)), torch.cat((held_values, new_values)), causal=True
    )
    assert torch.allclose(out, expected, atol=2e-5)


def test_what_is_small_or_does_not_fit_is_left_to_kernels() -> None:
    inflater = Inflater(LAYOUT, dtype=torch.bfloat16, device=CPU, max_tokens=16 * P)
    plain = PagedAttention(layout=LAYOUT, softmax_scale=SCALE)
    windowed = PagedAttention(layout=LAYOUT, softmax_scale=SCALE, sliding_window=100)
    assert inflater.serves(plain, 15 * P, 10**6)
    assert not inflater.serves(plain, 15 * P + 1, 10**6)
    assert not inflater.serves(plain, NUM_NEW - 1, 500)
    assert not inflater.serves(plain, NUM_NEW, 0)
    assert inflater.serves(windowed, NUM_NEW, 12 * P)
    assert not inflater.serves(windowed, NUM_NEW, 12 * P + 1)
