"""Attention over packed pages is attention over what they decode to, however the work is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_kernels import PRESETS, PageLayout, preset, reference_attention
from tq_kernels.reference import dequantize, quantize
from tq_kernels.reference_attention import decode_attention, extend_attention, merge_attention

from .tolerances import attention_error

P = 16
"""Tokens in a page here: many page edges in few tokens."""


def _layout(name: str, heads: int = 2, head_dim: int = 64) -> PageLayout:
    return PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=heads, page_tokens=P)


def _pages(layout: PageLayout, pages: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Pages, and the keys and values ``[pages, P, heads, dim]`` that they decode to."""
    shape = (pages * P, layout.num_kv_heads, layout.head_dim)
    keys = torch.randn(shape, generator=generator) + 2 * torch.randn(shape[1:], generator=generator)
    packed = quantize(keys, torch.randn(shape, generator=generator), layout)
    return packed, *(side.unflatten(0, (pages, P)) for side in dequantize(packed, layout))


def _exact(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    first_seen: int = 0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token and head by head in double precision. Queries ``[n, heads, dim]`` at `positions`."""
    num_query_heads, group = query.shape[1], query.shape[1] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        first = first_seen if sliding_window is None else max(first_seen, position - sliding_window + 1)
        seen = slice(first, min(position + 1, len(keys)))
        if seen.start >= seen.stop:
            continue
        for head in range(num_query_heads):
            scores = keys[seen, head // group].double() @ query[row, head].double() * softmax_scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, 0) @ values[seen, head // group].double()
            lse[row, head] = torch.logsumexp(scores, 0)
    return out, lse


def _assert_close(
    result: tuple[torch.Tensor, torch.Tensor],
    exact: tuple[torch.Tensor, torch.Tensor],
    bounds: tuple[float, float],
) -> None:
    assert result[0].isfinite().all()
    assert bounds[0] < 2e-3, "a bound that cannot see a mistake"
    torch.testing.assert_close(result[0].double(), exact[0], atol=bounds[0], rtol=0)
    torch.testing.assert_close(result[1].double(), exact[1], atol=bounds[1], rtol=0)


LENGTHS = [0, 1, P - 1, P, P + 1, 2 * P, 3 * P - 1, 5 * P]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sliding_window", [None, 1, 5, P, P + 3, 1000])
def test_decode_over_ragged_lengths_and_permuted_pages(
    name: str, sliding_window: int | None, generator: torch.Generator
) -> None:
    layout, scale = _layout(name), 0.125
    packed, keys, values = _pages(layout, 40, generator)
    query = torch.randn(len(LENGTHS), 4, 64, generator=generator)
    table = torch.full((len(LENGTHS), 6), -1, dtype=torch.int32)
    free = torch.randperm(40, generator=generator)
    for seq, length in enumerate(LENGTHS):
        used = -(-length // P)
        table[seq, :used], free = free[:used], free[used:]
    lengths = torch.tensor(LENGTHS)
    out, lse = decode_attention(
        query, packed, table, lengths, layout, softmax_scale=scale, sliding_window=sliding_window
    )
    for seq, length in enumerate(LENGTHS):
        own = table[seq, : -(-length // P)].long()
        own_keys, own_values = (side[own].flatten(0, 1)[:length] for side in (keys, values))
        row = slice(seq, seq + 1)
        exact = _exact(query[row], own_keys, own_values, lengths[row] - 1, scale, sliding_window)
        bounds = attention_error(query[row], own_keys, own_values, scale)
        _assert_close((out[row], lse[row]), exact, bounds)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("group", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_every_query_head_reads_its_own_kv_head(
    group: int, heads: int, head_dim: int, generator: torch.Generator
) -> None:
    layout = _layout("tq4", heads, head_dim)
    packed, keys, values = _pages(layout, 3, generator)
    query = torch.randn(1, group * heads, head_dim, generator=generator)
    length = torch.tensor([40])
    result = decode_attention(query, packed, torch.tensor([[0, 1, 2]]), length, layout, softmax_scale=0.1)
    keys, values = (side.flatten(0, 1)[:40] for side in (keys, values))

    exact = _exact(query, keys, values, length - 1, 0.1)
    _assert_close(result, exact, attention_error(query, keys, values, 0.1))


@pytest.mark.parametrize("sliding_window", [None, 1, 7, P, 30])
def test_query_positions_beyond_the_pages_move_the_window(
    sliding_window: int | None, generator: torch.Generator
) -> None:
    """A query whose last tokens are elsewhere, not yet in pages: only the window notices."""
    layout = _layout("tq4")
    packed, keys, values = _pages(layout, 2, generator)
    query = torch.randn(3, 2, 64, generator=generator)
    lengths, positions = torch.tensor([20, 20, 20]), torch.tensor([19, 25, 60])
    result = decode_attention(
        query,
        packed,
        torch.tensor([[0, 1]] * 3),
        lengths,
        layout,
        softmax_scale=0.125,
        sliding_window=sliding_window,
        query_positions=positions,
    )
    keys, values = (side.flatten(0, 1)[:20] for side in (keys, values))

    exact = _exact(query, keys, values, positions, 0.125, sliding_window)
    _assert_close(result, exact, attention_error(query, keys, values, 0.125))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_queries_are_what_their_float32_would_be(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    layout = _layout(name)
    packed, _, _ = _pages(layout, 2, generator)
    query = torch.randn(1, 4, 64, generator=generator).to(dtype)
    arguments = (packed, torch.tensor([[1, 0]]), torch.tensor([25]), layout)
    half = decode_attention(query, *arguments, softmax_scale=0.125)
    full = decode_attention(query.float(), *arguments, softmax_scale=0.125)

    assert half[0].dtype == half[1].dtype == torch.float32
    assert torch.equal(half[0], full[0])
    assert torch.equal(half[1], full[1])


def test_tokens_after_the_length_are_not_seen(generator: torch.Generator) -> None:
    """Whatever they are: a slot that was never written may hold NaNs."""
    layout = _layout("tq4")
    shape = (2 * P, 2, 64)
    keys, values = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    query = torch.randn(1, 2, 64, generator=generator)
    packed = quantize(keys, values, layout)
    changed = packed.clone()
    sections = changed.view(2, 2, layout.section_bytes)
    for name in ("key_scales", "value_scales"):
        plane = layout.plane(name)
        assert plane is not None
        # the scales of tokens 20 and on, which are 4 to 15 of the second page
        sections[1, :, plane.offset + 8 : plane.offset + 32] = 0xFF
    arguments = (torch.tensor([[0, 1]]), torch.tensor([20]), layout)
    before = decode_attention(query, packed, *arguments, softmax_scale=0.125)
    after = decode_attention(query, changed, *arguments, softmax_scale=0.125)

    assert not torch.equal(changed, packed)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["tq4", "k3v2", "k8v4", "fp8", "raw"])
@pytest.mark.parametrize(
    ("prefix_len", "num_raw", "num_new"),
    [(0, 5, 5), (1, 1, 1), (P - 1, 9, 9), (P, 3, 1), (P + 1, 20, 7), (3 * P, 33, 32)],
)
@pytest.mark.parametrize("sliding_window", [None, 4, P + 1, 40])
def test_extend_is_causal_attention_over_prefix_and_raw_tokens(
    name: str,
    prefix_len: int,
    num_raw: int,
    num_new: int,
    sliding_window: int | None,
    generator: torch.Generator,
) -> None:
    layout, scale = _layout(name), 0.125
    packed, keys, values = _pages(layout, 4, generator)
    table = torch.tensor([2, 0, 3, 1, -1])
    raw_keys = torch.randn(num_raw, 2, 64, generator=generator)
    raw_values = torch.randn(num_raw, 2, 64, generator=generator)
    query = torch.randn(num_new, 6, 64, generator=generator)
    result = extend_attention(
        query,
        raw_keys,
        raw_values,
        packed,
        table,
        prefix_len,
        layout,
        softmax_scale=scale,
        sliding_window=sliding_window,
    )
    all_keys = torch.cat((keys[table[:4]].flatten(0, 1)[:prefix_len], raw_keys))
    all_values = torch.cat((values[table[:4]].flatten(0, 1)[:prefix_len], raw_values))
    positions = torch.arange(prefix_len + num_raw - num_new, prefix_len + num_raw)

    exact = _exact(query, all_keys, all_values, positions, scale, sliding_window)
    _assert_close(result, exact, attention_error(query, all_keys, all_values, scale))


@pytest.mark.parametrize("num_sinks", [1, 4, P, P + 1])
@pytest.mark.parametrize("sliding_window", [None, 20])
def test_decode_leaves_sinks_to_the_caller(
    num_sinks: int, sliding_window: int | None, generator: torch.Generator
) -> None:
    """Also where there is nothing but sinks; merged with them it is attention over everything."""
    layout, scale = _layout("tq4"), 0.125
    packed, keys, values = _pages(layout, 3, generator)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    lengths = torch.tensor([0, 1, num_sinks, num_sinks + 1, 40])
    query = torch.randn(len(lengths), 4, 64, generator=generator)
    out, lse = decode_attention(
        query,
        packed,
        torch.tensor([[0, 1, 2]] * len(lengths)),
        lengths,
        layout,
        softmax_scale=scale,
        sliding_window=sliding_window,
        num_sinks=num_sinks,
    )
    bounds = attention_error(query, keys, values, scale)
    for seq, length in enumerate(lengths.tolist()):
        row, position = query[seq : seq + 1], lengths[seq : seq + 1] - 1
        own = keys[:length], values[:length], position, scale, sliding_window
        _assert_close((out[seq : seq + 1], lse[seq : seq + 1]), _exact(row, *own, num_sinks), bounds)
        sinks = min(num_sinks, length)
        apart = _exact(row, keys[:sinks], values[:sinks], position, scale, sliding_window)
        merged = merge_attention(out[seq : seq + 1], lse[seq : seq + 1], *apart)
        _assert_close(merged, _exact(row, *own), bounds)


@pytest.mark.parametrize("sliding_window", [None, 3, 20])
@pytest.mark.parametrize("name", ["tq4", "fp8"])
def test_rows_are_queries_at_successive_positions(
    name: str, sliding_window: int | None, generator: torch.Generator
) -> None:
    """Also in a sequence shorter than its rows, whose first rows stand before it and see nothing."""
    layout, rows = _layout(name), 5
    packed, keys, values = _pages(layout, 3, generator)
    lengths, query = torch.tensor([40, 3]), torch.randn(2, rows, 4, 64, generator=generator)
    out, lse = decode_attention(
        query,
        packed,
        torch.tensor([[2, 0, 1]] * 2),
        lengths,
        layout,
        softmax_scale=0.125,
        sliding_window=sliding_window,
    )
    keys, values = (side[[2, 0, 1]].flatten(0, 1) for side in (keys, values))
    for seq, length in enumerate(lengths.tolist()):
        positions = torch.arange(length - rows, length)
        exact = _exact(query[seq], keys[:length], values[:length], positions, 0.125, sliding_window)
        bounds = attention_error(query[seq], keys, values, 0.125)
        _assert_close((out[seq], lse[seq]), exact, bounds)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_a_soft_cap_bounds_scores_of_pages_and_of_raw_tokens(
    softcap: float, generator: torch.Generator
) -> None:
    layout = _layout("tq4")
    packed, keys, values = _pages(layout, 3, generator)
    raw = torch.randn(2, 6, 2, 64, generator=generator)
    query = torch.randn(4, 4, 64, generator=generator)
    table = torch.tensor([0, 1, 2])
    result = extend_attention(
        query, raw[0], raw[1], packed, table, 40, layout, softmax_scale=0.2, softcap=softcap
    )
    everything = [
        torch.cat((side.flatten(0, 1)[:40], own)) for side, own in zip((keys, values), raw, strict=True)
    ]
    exact = _exact(query, *everything, torch.arange(42, 46), 0.2, softcap=softcap)
    _assert_close(result, exact, attention_error(query, *everything, 0.2))
    result = decode_attention(
        query[:1], packed, table[None], torch.tensor([40]), layout, softmax_scale=0.2, softcap=softcap
    )
    keys, values = (side[:40] for side in everything)
    exact = _exact(query[:1], keys, values, torch.tensor([39]), 0.2, softcap=softcap)
    _assert_close(result, exact, attention_error(query, keys, values, 0.2))


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_takes_raw_sinks_in_place_of_their_pages(
    sliding_window: int | None, rows: int, generator: torch.Generator
) -> None:
    """One that a sequence has not reached may hold anything."""
    layout, num_sinks = _layout("tq4"), 5
    packed, keys, values = _pages(layout, 3, generator)
    lengths = torch.tensor([0, 2, 5, 30])
    sinks = torch.randn(2, 4, num_sinks, 2, 64, generator=generator)
    query = torch.randn(4, rows, 4, 64, generator=generator)
    for seq, length in enumerate(lengths.tolist()):
        sinks[:, seq, length:] = torch.nan
    out, lse = decode_attention(
        query,
        packed,
        torch.tensor([[0, 1, 2]] * 4),
        lengths,
        layout,
        softmax_scale=0.125,
        sliding_window=sliding_window,
        num_sinks=num_sinks,
        sink_keys=sinks[0],
        sink_values=sinks[1],
    )
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for seq, length in enumerate(lengths.tolist()):
        positions, present = torch.arange(length - rows, length), min(length, num_sinks)
        pages = _exact(
            query[seq], keys[:length], values[:length], positions, 0.125, sliding_window, num_sinks
        )
        raw = _exact(
            query[seq], sinks[0, seq, :present], sinks[1, seq, :present], positions, 0.125, sliding_window
        )
        bounds = attention_error(query[seq], keys, values, 0.125)
        _assert_close((out[seq], lse[seq]), merge_attention(*pages, *raw), bounds)


@pytest.mark.parametrize("name", ["tq4", "fp8"])
def test_a_balance_is_taken_back_by_the_query(name: str, generator: torch.Generator) -> None:
    layout = _layout(name)
    packed, keys, values = _pages(layout, 3, generator)
    balance = torch.rand(2, 64, generator=generator) + 0.5
    keys, values = keys.flatten(0, 1)[:40] * balance, values.flatten(0, 1)[:40]
    query, table = torch.randn(1, 4, 64, generator=generator), torch.tensor([0, 1, 2])
    result = decode_attention(
        query,
        packed,
        table[None],
        torch.tensor([40]),
        layout,
        softmax_scale=0.125,
        key_balance=balance,
    )
    bounds = attention_error(query, keys, values, 0.125)
    _assert_close(result, _exact(query, keys, values, torch.tensor([39]), 0.125), bounds)
    raw = torch.randn(2, 1, 2, 64, generator=generator)
    result = extend_attention(
        query,
        raw[0],
        raw[1],
        packed,
        table,
        40,
        layout,
        softmax_scale=0.125,
        key_balance=balance,
    )
    keys, values = torch.cat((keys, raw[0])), torch.cat((values, raw[1]))
    _assert_close(result, _exact(query, keys, values, torch.tensor([40]), 0.125), bounds)


@pytest.mark.parametrize("name", ["tq4", "raw"])
@pytest.mark.parametrize(("prefix_len", "num_sinks"), [(4, 4), (5, 1), (P + 3, 4), (3 * P, P + 1)])
@pytest.mark.parametrize("sliding_window", [None, 4, 25])
def test_extend_uses_raw_sinks_in_place_of_their_pages(
    name: str, prefix_len: int, num_sinks: int, sliding_window: int | None, generator: torch.Generator
) -> None:
    layout, scale, num_raw, num_new = _layout(name), 0.125, 9, 6
    packed, keys, values = _pages(layout, 3, generator)
    raw_keys, raw_values = torch.randn(2, num_sinks + num_raw, 2, 64, generator=generator)
    query = torch.randn(num_new, 4, 64, generator=generator)
    result = extend_attention(
        query,
        raw_keys,
        raw_values,
        packed,
        torch.tensor([0, 1, 2]),
        prefix_len,
        layout,
        softmax_scale=scale,
        sliding_window=sliding_window,
        num_sinks=num_sinks,
    )
    everything = [
        torch.cat((raw[:num_sinks], side.flatten(0, 1)[num_sinks:prefix_len], raw[num_sinks:]))
        for raw, side in ((raw_keys, keys), (raw_values, values))
    ]
    positions = torch.arange(prefix_len + num_raw - num_new, prefix_len + num_raw)

    exact = _exact(query, *everything, positions, scale, sliding_window)
    _assert_close(result, exact, attention_error(query, *everything, scale))


@pytest.mark.parametrize("floats_at_once", [1, 100, 1000, 5000])
@pytest.mark.parametrize("sliding_window", [None, 21])
def test_cutting_the_work_does_not_change_it(
    floats_at_once: int,
    sliding_window: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = _layout("tq4")
    packed, keys, values = _pages(layout, 5, generator)
    raw = torch.randn(2, 30, 2, 64, generator=generator)
    query = torch.randn(20, 4, 64, generator=generator)
    arguments = (query, raw[0], raw[1], packed, torch.tensor([4, 1, 0, 3, 2]), 70, layout)
    whole = extend_attention(*arguments, softmax_scale=0.125, sliding_window=sliding_window)
    monkeypatch.setattr(reference_attention, "_FLOATS_AT_ONCE", floats_at_once)
    cut = extend_attention(*arguments, softmax_scale=0.125, sliding_window=sliding_window)
    bounds = attention_error(
        query, torch.cat((keys.flatten(0, 1), raw[0])), torch.cat((values.flatten(0, 1), raw[1])), 0.125
    )

    torch.testing.assert_close(cut[0], whole[0], atol=bounds[0], rtol=0)
    torch.testing.assert_close(cut[1], whole[1], atol=bounds[1], rtol=0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    num_tokens=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_merged_parts_are_the_whole(num_tokens: int, cuts: list[int], seed: int, size: float) -> None:
    """Parts of any number and size, empty ones included, in any order; also for scores that overflow exp."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, num_tokens, 1, 8, generator=generator)
    query = size * torch.randn(3, 1, 8, generator=generator)
    everything = torch.full((3,), num_tokens)
    edges = [0, *sorted(min(cut, num_tokens) for cut in cuts), num_tokens]
    parts = [_exact(query, keys[a:b], values[a:b], everything, 1.0) for a, b in itertools.pairwise(edges)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_attention(*part, *merged)
    whole = _exact(query, keys, values, everything, 1.0)

    torch.testing.assert_close(merged[0], whole[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(merged[1], whole[1], atol=1e-10, rtol=0)


def test_merging_two_empty_parts_gives_an_empty_one() -> None:
    nothing = torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf)
    out, lse = merge_attention(*nothing, *nothing)

    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])


def test_heads_that_do_not_divide_are_refused(generator: torch.Generator) -> None:
    layout = _layout("tq4", heads=2)
    packed, _, _ = _pages(layout, 1, generator)
    with pytest.raises(ValueError, match=r"a multiple of 2 heads, 64\], not \[1, 3, 64\]"):
        decode_attention(
            torch.zeros(1, 3, 64), packed, torch.tensor([[0]]), torch.tensor([4]), layout, softmax_scale=1.0
        )


def test_more_queries_than_raw_keys_are_refused(generator: torch.Generator) -> None:
    layout = _layout("tq4")
    packed, _, _ = _pages(layout, 1, generator)
    raw = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match="4 queries need at least one row and as many raw keys, not 3"):
        extend_attention(
            torch.zeros(4, 2, 64), raw, raw, packed, torch.tensor([0]), 8, layout, softmax_scale=1.0
        )
    with pytest.raises(ValueError, match="3 queries need at least one row and as many raw keys, not 2"):
        extend_attention(raw, raw, raw, packed, torch.tensor([0]), 8, layout, softmax_scale=1.0, num_sinks=1)


@pytest.mark.parametrize(("num_sinks", "prefix_len"), [(4, 3), (1, 0), (-1, 8)])
def test_sinks_beyond_the_prefix_are_refused(
    num_sinks: int, prefix_len: int, generator: torch.Generator
) -> None:
    layout = _layout("tq4")
    packed, _, _ = _pages(layout, 1, generator)
    raw = torch.zeros(9, 2, 64)
    with pytest.raises(ValueError, match=f"{num_sinks} sinks do not lie within a prefix of {prefix_len}"):
        extend_attention(
            raw[:1],
            raw,
            raw,
            packed,
            torch.tensor([0]),
            prefix_len,
            layout,
            softmax_scale=1.0,
            num_sinks=num_sinks,
        )


def test_no_query_is_refused_and_no_sequence_gives_nothing(generator: torch.Generator) -> None:
    layout = _layout("tq4")
    packed, _, _ = _pages(layout, 1, generator)
    raw = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match="0 queries need at least one row"):
        extend_attention(raw[:0], raw, raw, packed, torch.tensor([0]), 8, layout, softmax_scale=1.0)
    out, lse = decode_attention(
        raw[:0],
        packed,
        torch.zeros(0, 1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        layout,
        softmax_scale=1.0,
    )
    assert (out.shape, lse.shape) == ((0, 2, 64), (0, 2))
    half = decode_attention(
        raw[:0].to("meta", torch.float16),
        packed.to("meta"),
        torch.zeros(0, 1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        layout,
        softmax_scale=1.0,
    )
    assert {(side.dtype, side.device.type) for side in half} == {(torch.float32, "meta")}


@pytest.mark.parametrize("name", PRESETS)
def test_everything_is_made_on_the_device_of_the_tensors(name: str) -> None:
    """The meta device takes no tensor of another device, like a GPU."""
    layout = _layout(name)
    raw = torch.empty(2 * P, 2, 64, dtype=torch.bfloat16, device="meta")
    packed = quantize(raw, raw, layout)
    results = extend_attention(
        torch.empty(3, 4, 64, dtype=torch.bfloat16, device="meta"),
        raw,
        raw,
        packed,
        torch.empty(2, dtype=torch.int64, device="meta"),
        2 * P,
        layout,
        softmax_scale=0.125,
        sliding_window=20,
        num_sinks=4,
    )
    assert {tensor.device.type for tensor in (packed, *dequantize(packed, layout), *results)} == {"meta"}


def test_decoded_pages_are_bounded_in_memory(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query has few scores, but what its pages decode to is not few."""
    layout, sizes = _layout("tq4"), []
    packed, _, _ = _pages(layout, 8, generator)
    read = reference_attention.read_side
    monkeypatch.setattr(
        reference_attention,
        "read_side",
        lambda pages, *rest: (sizes.append(len(pages)), read(pages, *rest))[1],
    )
    monkeypatch.setattr(reference_attention, "_FLOATS_AT_ONCE", 3 * P * 2 * 64)
    query = torch.randn(1, 2, 64, generator=generator)
    decode_attention(query, packed, torch.arange(8)[None], torch.tensor([8 * P]), layout, softmax_scale=0.125)
    assert sizes == [3, 3, 3, 3, 2, 2]  # keys and values of each run of pages


@pytest.mark.parametrize("shape", [(1, 2, 32), (2, 64), (1, 2, 64, 1)])
def test_a_query_of_another_shape_is_refused(shape: tuple[int, ...], generator: torch.Generator) -> None:
    layout = _layout("tq4")
    packed, _, _ = _pages(layout, 1, generator)
    raw = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match="query must be"):
        extend_attention(
            torch.zeros(shape), raw, raw, packed, torch.tensor([0]), 8, layout, softmax_scale=1.0
        )
