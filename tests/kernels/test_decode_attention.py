"""Decode attention keeps FlashAttention's rule against the float32 reference over the same pages."""

import dataclasses
from typing import Any

import pytest
import torch

from tq_kernels import PRESETS, PageLayout, preset, reference_attention
from tq_kernels._dispatch import is_interpreted
from tq_kernels.decode_attention import DecodeWorkspace, decode_attention, decode_workspace
from tq_kernels.decode_plan import Machine, Variant, choose_variant, machine_of, plan_decode
from tq_kernels.reference import dequantize, quantize

from .attention_cases import FlashRule, Guarded, Pages, far_away, make_pages, seen_tokens

H100 = Machine(capability=(9, 0), num_processors=132)


def _variants(pages: Pages) -> list[Variant]:
    """The plain kernel, and the one that this machine prefers for such pages."""
    preferred = choose_variant(machine_of(pages.packed.device), pages.layout)
    return ["plain"] if preferred == "plain" else ["plain", preferred]


def _workspace(
    pages: Pages,
    num_seqs: int,
    num_query_heads: int,
    max_pages: int,
    rows: int = 1,
    variant: Variant = "plain",
) -> DecodeWorkspace:
    """A poisoned workspace whose plan is that of a variant."""
    device = pages.packed.device
    plan = plan_decode(
        pages.layout,
        machine_of(device),
        num_seqs=num_seqs,
        num_query_heads=num_query_heads,
        max_pages=max_pages,
        rows=rows,
        variant=variant,
    )
    assert plan.variant == variant
    workspace = decode_workspace(pages.layout, num_seqs, num_query_heads, max_pages, device, rows, plan)
    for tensor in (workspace.prepared, workspace.partial_out, workspace.partial_lse):
        tensor.fill_(torch.nan)
    workspace.positions.fill_(-1 << 20)
    return workspace


def _table(lengths: list[int], pages: Pages, generator: torch.Generator) -> torch.Tensor:
    """Pages in any order, and -1 past the end of a sequence."""
    device, page_tokens = pages.packed.device, pages.layout.page_tokens
    table = torch.full((len(lengths), max(lengths) // page_tokens + 2), -1, dtype=torch.int32)
    free = torch.randperm(len(pages.packed), generator=generator).to(torch.int32)
    for seq, length in enumerate(lengths):
        used = -(-length // page_tokens)
        table[seq, :used], free = free[:used], free[used:]
    return table.to(device)


def _check(
    pages: Pages,
    query: torch.Tensor,
    lengths: list[int],
    generator: torch.Generator,
    *,
    query_positions: list[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    num_sinks: int = 0,
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_balance: torch.Tensor | None = None,
    softmax_scale: float = 0.125,
) -> None:
    """Run every variant into guarded outputs and hold every sequence to the rule."""
    device = query.device
    table = _table(lengths, pages, generator)
    for seq, length in enumerate(lengths):
        last = length % pages.layout.page_tokens
        if last:
            pages.forget(int(table[seq, length // pages.layout.page_tokens]), last)
    arguments = {
        "softmax_scale": softmax_scale,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "num_sinks": num_sinks,
        "key_balance": key_balance,
    }
    if query_positions is not None:
        arguments["query_positions"] = torch.tensor(query_positions, dtype=torch.int32, device=device)
    if sinks is not None:
        arguments["sink_keys"], arguments["sink_values"] = sinks
    numbers = torch.tensor(lengths, dtype=torch.int32, device=device)
    rows = query.shape[1] if query.dim() == 4 else 1
    truth = reference_attention.decode_attention(
        query, pages.packed, table, numbers, pages.layout, **arguments
    )
    for variant in _variants(pages):
        out = Guarded(tuple(query.shape), query.dtype, device)
        lse = Guarded(tuple(query.shape[:-1]), torch.float32, device)
        result = decode_attention(
            query,
            pages.packed,
            table,
            numbers,
            pages.layout,
            out=out.inner,
            lse=lse.inner,
            workspace=_workspace(pages, len(query), query.shape[-2], table.shape[1], rows, variant),
            **arguments,
        )
        assert result[0] is out.inner
        assert result[1] is lse.inner
        out.check()
        lse.check()
        rule = FlashRule()
        for seq, length in enumerate(lengths):
            last = length - 1 if query_positions is None else query_positions[seq]
            positions = torch.arange(last - rows + 1, last + 1, device=device)
            keys, values = pages.tokens(table[seq], length)
            token_positions = torch.arange(length, device=device)
            seen = seen_tokens(positions, token_positions, sliding_window) & (token_positions >= num_sinks)
            if sinks is not None:
                present = min(num_sinks, last + 1)
                keys = torch.cat((sinks[0][seq, :present].float(), keys))
                values = torch.cat((sinks[1][seq, :present].float(), values))
                sink_positions = torch.arange(present, device=device)
                seen = torch.cat((seen_tokens(positions, sink_positions, sliding_window), seen), dim=1)
            rule.add(
                (result[0][seq].view(rows, -1, query.shape[-1]), result[1][seq].view(rows, -1)),
                (truth[0][seq].view(rows, -1, query.shape[-1]), truth[1][seq].view(rows, -1)),
                query[seq].view(rows, -1, query.shape[-1]),
                keys,
                values,
                seen,
                softmax_scale=softmax_scale,
                softcap=softcap,
            )
        rule.check()


def _query(
    *shape: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_every_preset_over_ragged_lengths_and_permuted_pages(
    name: str, page_tokens: int, generator: torch.Generator, device: torch.device
) -> None:
    lengths = [0, 1, 15, 16, 17, 70]
    pages = make_pages(name, 12, generator, device, page_tokens=page_tokens)
    query = _query(len(lengths), 4, 64, generator=generator, device=device)

    _check(pages, query, lengths, generator)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("fp8", "raw")])
@pytest.mark.parametrize(("rows", "sliding_window"), [(1, None), (4, None), (2, 50)])
def test_pages_of_the_usual_size(
    name: str, rows: int, sliding_window: int | None, generator: torch.Generator, device: torch.device
) -> None:
    """128 tokens by 128 channels, where a Hopper card has a kernel of its own."""
    if machine_of(device).gluon:
        assert "hopper" in _variants(make_pages(name, 1, generator, device, head_dim=128, page_tokens=128))
    lengths = [1, 300, 128]
    pages = make_pages(name, 6, generator, device, heads=1, head_dim=128, page_tokens=128)
    query = _query(len(lengths), rows, 4, 128, generator=generator, device=device, dtype=torch.bfloat16)

    _check(pages, query, lengths, generator, sliding_window=sliding_window)


@pytest.mark.parametrize(
    ("group", "heads", "head_dim", "page_tokens"),
    [(1, 3, 64, 32), (2, 1, 80, 32), (7, 2, 64, 128), (4, 1, 96, 16), (3, 2, 128, 64), (16, 1, 256, 32)],
)
@pytest.mark.parametrize("name", ["tq4", "k3v2"])
def test_groups_heads_head_sizes_and_page_sizes(
    name: str,
    group: int,
    heads: int,
    head_dim: int,
    page_tokens: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    pages = make_pages(name, 6, generator, device, heads=heads, head_dim=head_dim, page_tokens=page_tokens)
    query = _query(1, group * heads, head_dim, generator=generator, device=device)

    _check(pages, query, [77], generator, softmax_scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["tq4", "raw"])
def test_query_dtypes(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    pages = make_pages(name, 4, generator, device, page_tokens=32)
    query = _query(2, 4, 64, generator=generator, device=device, dtype=dtype)

    _check(pages, query, [40, 64], generator)


@pytest.mark.parametrize(("rows", "group"), [(2, 1), (5, 4), (16, 2), (16, 8)])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_drafted_rows_see_no_later_token(
    rows: int, group: int, sliding_window: int | None, generator: torch.Generator, device: torch.device
) -> None:
    """Also where a sequence is shorter than its rows: the first of them see nothing."""
    pages = make_pages("tq4", 8, generator, device, heads=1)
    query = _query(3, rows, group, 64, generator=generator, device=device)

    _check(pages, query, [45, rows, max(1, rows - 3)], generator, sliding_window=sliding_window)


@pytest.mark.parametrize(
    ("name", "sliding_window"), [("tq4", 1), ("tq2", 7), ("tq4", 16), ("tq2", 33), ("tq4", 1000)]
)
def test_sliding_windows_with_queries_at_and_beyond_the_end(
    name: str, sliding_window: int, generator: torch.Generator, device: torch.device
) -> None:
    pages = make_pages(name, 20, generator, device)
    query = _query(4, 2, 64, generator=generator, device=device)

    _check(
        pages,
        query,
        [60, 60, 60, 3],
        generator,
        sliding_window=sliding_window,
        query_positions=[59, 62, 100, 2],
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sliding_window", [None, 12])
def test_queries_before_the_end_of_their_pages(
    rows: int, sliding_window: int | None, generator: torch.Generator, device: torch.device
) -> None:
    """Tokens after a row are hidden, whether or not they are in pages already."""
    pages = make_pages("tq4", 8, generator, device)
    query = _query(2, rows, 4, 64, generator=generator, device=device)

    _check(pages, query, [60, 40], generator, sliding_window=sliding_window, query_positions=[20, 38])


@pytest.mark.parametrize(("name", "softcap"), [("tq4", 2.0), ("k8v4", 30.0), ("fp8", 2.0)])
def test_soft_caps(name: str, softcap: float, generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages(name, 6, generator, device)
    query = _query(2, 4, 64, generator=generator, device=device)

    _check(pages, query, [50, 3], generator, softcap=softcap, softmax_scale=0.5)


@pytest.mark.parametrize("num_sinks", [1, 4, 17])
def test_sinks_are_left_out_of_the_pages(
    num_sinks: int, generator: torch.Generator, device: torch.device
) -> None:
    """Also where there is nothing but sinks."""
    pages = make_pages("tq4", 12, generator, device)
    query = _query(4, 4, 64, generator=generator, device=device)

    _check(pages, query, [0, num_sinks, num_sinks + 1, 40], generator, num_sinks=num_sinks)


@pytest.mark.parametrize("name", ["tq4", "fp8"])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (3, torch.bfloat16)])
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_raw_sinks_take_their_place_where_the_window_reaches(
    name: str,
    rows: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Sinks that a sequence has not reached may hold anything."""
    num_sinks, lengths = 5, [0, 2, 5, 30]
    pages = make_pages(name, 8, generator, device)
    sinks = torch.randn(2, len(lengths), num_sinks, 2, 64, generator=generator)
    for seq, length in enumerate(lengths):
        sinks[:, seq, length:] = torch.nan
    sinks = sinks.to(device, dtype)
    query = _query(len(lengths), rows, 4, 64, generator=generator, device=device, dtype=dtype)

    _check(
        pages,
        query,
        lengths,
        generator,
        num_sinks=num_sinks,
        sinks=(sinks[0], sinks[1]),
        sliding_window=sliding_window,
        softcap=20.0 if rows == 3 else None,
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_sinks_lie_in_rows_of_any_order(rows: int, generator: torch.Generator, device: torch.device) -> None:
    """The same as when every sequence has its own in its place; rows of nobody hold no number."""
    lengths, sink_rows = [3, 9, 30], [5, 0, 5]
    pages = make_pages("tq4", 8, generator, device)
    own = torch.randn(2, 6, 4, 2, 64, generator=generator)
    own[:, [1, 2, 3, 4]] = torch.nan
    own = own.to(device, torch.bfloat16)
    query = _query(3, rows, 4, 64, generator=generator, device=device)
    table = _table(lengths, pages, generator)
    numbers = torch.tensor(lengths, dtype=torch.int32, device=device)
    at = torch.tensor(sink_rows, dtype=torch.int32, device=device)
    for variant in _variants(pages):
        parts = [
            decode_attention(
                query,
                pages.packed,
                table,
                numbers,
                pages.layout,
                softmax_scale=0.125,
                num_sinks=4,
                workspace=_workspace(pages, 3, 4, table.shape[1], rows, variant),
                **sinks,
            )
            for sinks in (
                {"sink_keys": own[0], "sink_values": own[1], "sink_rows": at},
                {"sink_keys": own[0, sink_rows], "sink_values": own[1, sink_rows]},
            )
        ]
        assert torch.equal(parts[0][0], parts[1][0])
        assert torch.equal(parts[0][1], parts[1][1])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sequence_without_raw_sinks_reads_its_pages_from_the_start(
    rows: int, generator: torch.Generator, device: torch.device
) -> None:
    lengths = [3, 30]
    pages = make_pages("tq4", 8, generator, device)
    own = torch.randn(2, 1, 4, 2, 64, generator=generator).to(device, torch.bfloat16)
    query = _query(2, rows, 4, 64, generator=generator, device=device)
    table = _table(lengths, pages, generator)
    numbers = torch.tensor(lengths, dtype=torch.int32, device=device)
    for variant in _variants(pages):
        for row, others in ((0, {"num_sinks": 4, "sink_keys": own[0], "sink_values": own[1]}), (1, {})):
            found, alone = (
                decode_attention(
                    query,
                    pages.packed,
                    table,
                    numbers,
                    pages.layout,
                    softmax_scale=0.125,
                    workspace=_workspace(pages, 2, 4, table.shape[1], rows, variant),
                    **arguments,
                )
                for arguments in (
                    {
                        "num_sinks": 4,
                        "sink_keys": own[0],
                        "sink_values": own[1],
                        "sink_rows": torch.tensor([0, -1], dtype=torch.int32, device=device),
                    },
                    others
                    | ({"sink_rows": torch.zeros(2, dtype=torch.int32, device=device)} if others else {}),
                )
            )
            assert torch.equal(found[0][row], alone[0][row])
            assert torch.equal(found[1][row], alone[1][row])


@pytest.mark.parametrize("name", ["tq4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_balance_is_taken_back_by_the_query(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    balance = torch.rand(2, 64, generator=generator) * 3 + 0.2
    pages = make_pages(name, 6, generator, device, key_balance=balance)
    query = _query(2, 6, 64, generator=generator, device=device, dtype=dtype)

    _check(pages, query, [50, 20], generator, key_balance=balance.to(device))


@pytest.mark.parametrize("name", ["tq4", "k8v4", "fp8", "raw"])
def test_values_of_very_different_size(name: str, generator: torch.Generator, device: torch.device) -> None:
    """A token that takes nearly all of the attention has tiny values, as sinks do, and a few have none."""
    keys = torch.randn(32, 1, 64, generator=generator)
    values = torch.randn(32, 1, 64, generator=generator) * 2.0 ** torch.randint(
        -6, 5, (32, 1, 1), generator=generator
    )
    query = torch.randn(1, 1, 64, generator=generator).to(device)
    keys[3], values[3], values[7:9] = 1.5 * query[0].cpu(), 1e-3, 0.0
    layout = PageLayout(spec=preset(name), head_dim=64, num_kv_heads=1, page_tokens=32)
    packed = quantize(keys, values, layout).to(device)
    keys, values = (side.unflatten(0, (1, 32)) for side in dequantize(packed, layout))
    pages = Pages(layout=layout, packed=packed, keys=keys, values=values)

    _check(pages, query, [32], generator)


def test_values_that_are_zero_give_zeros(generator: torch.Generator, device: torch.device) -> None:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=1, page_tokens=16)
    keys = torch.randn(16, 1, 64, generator=generator)
    packed = quantize(keys, torch.zeros_like(keys), layout).to(device)
    query = torch.randn(1, 1, 64, generator=generator).to(device)
    table, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [16]))
    out, lse = decode_attention(query, packed, table, lengths, layout, softmax_scale=0.125)
    _, truth = reference_attention.decode_attention(
        query, packed, table, lengths, layout, softmax_scale=0.125
    )

    assert not out.any()
    torch.testing.assert_close(lse, truth, atol=1e-2, rtol=0)


def test_one_workspace_serves_fewer_and_longer_sequences(
    generator: torch.Generator, device: torch.device
) -> None:
    """Its plan was made for other lengths; it stays right."""
    pages = make_pages("tq4", 16, generator, device)
    workspace = _workspace(pages, 5, 4, 2)
    query = _query(2, 4, 64, generator=generator, device=device)
    table = _table([130, 40], pages, generator)
    lengths = torch.tensor([130, 40], dtype=torch.int32, device=device)
    arguments = (query, pages.packed, table, lengths, pages.layout)
    result = decode_attention(*arguments, softmax_scale=0.125, workspace=workspace)
    again = decode_attention(*arguments, softmax_scale=0.125, workspace=workspace)
    truth = reference_attention.decode_attention(*arguments, softmax_scale=0.125)

    assert workspace.plan.num_splits < table.shape[1]
    assert torch.equal(result[0], again[0])
    torch.testing.assert_close(result[0], truth[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("num_splits", [1, 2, 70])
@pytest.mark.parametrize("name", ["tq4", "k3v2"])
def test_any_number_of_splits(
    name: str, num_splits: int, generator: torch.Generator, device: torch.device
) -> None:
    """Splits of many pages, of a page and a part, and more splits than a sequence has strips."""
    lengths = [2200, 1111, 150]
    pages = make_pages(name, 56, generator, device, page_tokens=64)
    query = _query(3, 4, 64, generator=generator, device=device)
    table = _table(lengths, pages, generator)
    arguments = (query, pages.packed, table, torch.tensor(lengths, dtype=torch.int32, device=device))
    truth = reference_attention.decode_attention(*arguments, pages.layout, softmax_scale=0.125)
    for variant in _variants(pages):
        plan = _workspace(pages, 3, 4, 35, variant=variant).plan
        workspace = decode_workspace(
            pages.layout, 3, 4, 35, device, plan=dataclasses.replace(plan, num_splits=num_splits)
        )
        out, lse = decode_attention(*arguments, pages.layout, softmax_scale=0.125, workspace=workspace)

        torch.testing.assert_close(out, truth[0], atol=2e-3, rtol=0)
        torch.testing.assert_close(lse, truth[1], atol=2e-3, rtol=0)


def test_strided_queries_and_outputs(generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 4, generator, device)
    wide = _query(2, 3, 4, 128, generator=generator, device=device)
    query, table = wide[:, ::2, :, :64], _table([30, 9], pages, generator)
    lengths = torch.tensor([30, 9], dtype=torch.int32, device=device)
    out = torch.full((4, 2, 2, 64), torch.nan, device=device).permute(2, 1, 0, 3)
    lse = torch.full((4, 2, 2), torch.nan, device=device).permute(2, 1, 0)
    arguments = (pages.packed, table, lengths, pages.layout)
    decode_attention(query, *arguments, softmax_scale=0.125, out=out, lse=lse)
    dense = decode_attention(query.contiguous(), *arguments, softmax_scale=0.125)

    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])


def test_pages_beyond_two_to_the_31_bytes(generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 3, generator, device)
    pool, first = far_away(pages)
    query = _query(1, 4, 64, generator=generator, device=device)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    workspace = _workspace(pages, 1, 4, 3)
    near, far = (
        decode_attention(
            query, packed, numbers, lengths, pages.layout, softmax_scale=0.125, workspace=workspace
        )
        for packed, numbers in ((pages.packed, table), (pool, table + first))
    )

    assert torch.equal(near[0], far[0])
    assert torch.equal(near[1], far[1])


def test_no_sequence_gives_nothing(device: torch.device) -> None:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    numbers = torch.zeros(0, dtype=torch.int32, device=device)
    out, lse = decode_attention(
        torch.zeros(0, 4, 64, device=device),
        torch.zeros(0, layout.page_bytes, dtype=torch.uint8, device=device),
        numbers.view(0, 1),
        numbers,
        layout,
        softmax_scale=1.0,
    )

    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_without_triton_a_cpu_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not is_interpreted()
    pages = make_pages("tq4", 4, generator, torch.device("cpu"))
    query, table = torch.randn(1, 2, 4, 64, generator=generator), _table([40], pages, generator)
    arguments = (query, pages.packed, table, torch.tensor([40], dtype=torch.int32), pages.layout)
    out, lse = decode_attention(*arguments, softmax_scale=0.125)
    truth = reference_attention.decode_attention(*arguments, softmax_scale=0.125)

    assert torch.equal(out, truth[0])
    assert torch.equal(lse, truth[1])


LAYOUT = PageLayout(spec=preset("tq4"), head_dim=128, num_kv_heads=8, page_tokens=128)


def _plan(**changes: Any) -> Any:
    arguments = {"num_seqs": 32, "num_query_heads": 32, "max_pages": 256, "variant": "plain"}
    return plan_decode(LAYOUT, H100, **(arguments | changes))


def test_a_plan_is_a_value() -> None:
    assert _plan() == _plan()
    assert hash(_plan()) == hash(_plan())
    with pytest.raises(dataclasses.FrozenInstanceError):
        _plan().num_splits = 3


@pytest.mark.parametrize(
    ("rows", "columns", "padded", "tile"),
    [(1, 4, 8, 8), (2, 8, 8, 8), (3, 12, 16, 16), (5, 20, 32, 32), (16, 64, 64, 64)],
)
def test_columns_are_padded_to_tiles(rows: int, columns: int, padded: int, tile: int) -> None:
    plan = _plan(rows=rows)

    assert plan.variant == "plain"
    assert (plan.columns, plan.padded_columns, plan.tile_columns) == (columns, padded, tile)


def test_many_columns_are_shared_out_among_programs() -> None:
    plan = _plan(rows=16, num_query_heads=8 * 12)

    assert (plan.columns, plan.padded_columns, plan.tile_columns) == (192, 192, 64)


@pytest.mark.parametrize(
    ("num_seqs", "max_pages"), [(1, 1024), (1, 32), (8, 64), (32, 64), (32, 256), (64, 64), (300, 8)]
)
def test_splits_fill_the_machine_and_its_waves(num_seqs: int, max_pages: int) -> None:
    plan = _plan(num_seqs=num_seqs, max_pages=max_pages)
    resident = 3 * H100.num_processors
    programs = num_seqs * LAYOUT.num_kv_heads * plan.num_splits
    waves = -(-programs // resident)

    assert 1 <= plan.num_splits <= max_pages
    assert programs >= 0.6 * waves * resident or plan.num_splits == max_pages
    assert waves <= 8


def test_a_merge_takes_several_columns_a_program_only_where_there_are_many() -> None:
    assert _plan(num_seqs=1).merge_columns == 1
    assert _plan(num_seqs=64, rows=16).merge_columns > 1


def _arguments() -> dict[str, Any]:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    return {
        "query": torch.zeros(3, 4, 64),
        "pages": torch.zeros(2, layout.page_bytes, dtype=torch.uint8),
        "block_table": torch.zeros(3, 2, dtype=torch.int32),
        "lengths": torch.zeros(3, dtype=torch.int32),
        "layout": layout,
        "softmax_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 64)}, "query must have 3 or 4 dimensions"),
        ({"query": torch.zeros(3, 4, 32)}, r"query must be \[any, any, 64\]"),
        ({"query": torch.zeros(3, 4, 64).double()}, "query must be .* torch.float64"),
        ({"query": torch.zeros(3, 5, 64)}, "1 to 16 times the 2 KV heads, not 5"),
        ({"query": torch.zeros(3, 34, 64)}, "1 to 16 times the 2 KV heads, not 34"),
        ({"query": torch.zeros(3, 17, 4, 64)}, "1 to 16 query rows, not 17"),
        ({"query": torch.zeros(3, 64, 4).mT}, "last 1 dimension.* of query must be contiguous"),
        ({"pages": torch.zeros(2, 5, dtype=torch.uint8)}, "pages must be"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int64)}, "block_table must be .* int32"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, r"block_table must be \[3, any\]"),
        ({"lengths": torch.zeros(3)}, r"lengths must be \[3\] int32"),
        ({"query_positions": torch.zeros(2, dtype=torch.int32)}, r"query_positions must be \[3\]"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, not 0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"num_sinks": -1}, "num_sinks must not be negative"),
        ({"sink_keys": torch.zeros(3, 1, 2, 64).half()}, "come together"),
        (
            {
                "num_sinks": 65,
                "sink_keys": torch.zeros(3, 65, 2, 64).half(),
                "sink_values": torch.zeros(3, 65, 2, 64).half(),
            },
            "at most 64 sinks are merged, not 65",
        ),
        (
            {"sink_keys": torch.zeros(3, 1, 2, 64).half(), "sink_values": torch.zeros(3, 1, 2, 64).half()},
            r"sink_keys must be \[3, 0, 2, 64\]",
        ),
        (
            {
                "num_sinks": 1,
                "sink_keys": torch.zeros(3, 1, 2, 64).half(),
                "sink_values": torch.zeros(3, 1, 2, 64).bfloat16(),
            },
            "sink_values must be .* float16",
        ),
        (
            {
                "num_sinks": 2,
                "sink_keys": torch.zeros(3, 2, 2, 64).half(),
                "sink_values": torch.zeros(3, 2, 2, 64).half().transpose(1, 2),
            },
            "equal strides",
        ),
        ({"sink_rows": torch.zeros(3, dtype=torch.int32)}, "sink_rows needs sink_keys"),
        (
            {
                "num_sinks": 1,
                "sink_keys": torch.zeros(7, 1, 2, 64).half(),
                "sink_values": torch.zeros(7, 1, 2, 64).half(),
                "sink_rows": torch.zeros(7, dtype=torch.int32),
            },
            r"sink_rows must be \[3\] int32",
        ),
        ({"key_balance": torch.zeros(2, 64).half()}, "key_balance must be .* float32"),
        ({"out": torch.zeros(3, 4, 32)}, r"out must be \[3, 4, 64\]"),
        ({"lse": torch.zeros(3, 4).half()}, r"lse must be \[3, 4\] float32"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(**(_arguments() | changes))


def test_pages_that_are_no_power_of_two_are_refused() -> None:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=48)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="page_tokens to be a power of two, not 48"):
        decode_attention(**(_arguments() | {"layout": layout, "pages": pages}))


@pytest.mark.parametrize(
    ("num_seqs", "num_query_heads", "rows", "change"),
    [
        (2, 4, 1, {}),
        (3, 6, 1, {}),
        (3, 4, 2, {}),
        (3, 4, 1, {"page_tokens": 64}),
        (3, 4, 1, {"spec": preset("fp8")}),
    ],
)
def test_a_workspace_for_something_else_is_refused(
    num_seqs: int, num_query_heads: int, rows: int, change: dict[str, Any]
) -> None:
    arguments = _arguments()
    layout = dataclasses.replace(arguments["layout"], **change)
    workspace = decode_workspace(layout, num_seqs, num_query_heads, 2, torch.device("cpu"), rows)
    with pytest.raises(ValueError, match="the workspace is for"):
        decode_attention(**arguments, workspace=workspace)
