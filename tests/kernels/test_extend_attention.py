"""Extend attention keeps FlashAttention's rule, whichever way the plan reads the prefix."""

import dataclasses
from typing import Any

import pytest
import torch

from tq_kernels import PRESETS, PageLayout, preset, reference_attention
from tq_kernels.decode_plan import Machine, machine_of
from tq_kernels.extend_attention import ExtendWorkspace, extend_attention, extend_workspace
from tq_kernels.extend_plan import WORKSPACE_TOKENS, ExtendPlan, Variant, plan_extend

from .attention_cases import FlashRule, Guarded, Pages, far_away, make_pages, seen_tokens

H100 = Machine(capability=(9, 0), num_processors=132)


def _plan(pages: Pages, query: torch.Tensor, prefix_len: int, variant: Variant, **options: Any) -> ExtendPlan:
    plan = plan_extend(
        pages.layout,
        machine_of(query.device),
        num_new=query.shape[0],
        num_query_heads=query.shape[1],
        prefix_len=prefix_len,
        variant=variant,
        **options,
    )
    assert plan.variant == variant
    return plan


def _check(
    pages: Pages,
    query: torch.Tensor,
    prefix_len: int,
    num_raw: int,
    variant: Variant,
    generator: torch.Generator,
    *,
    num_sinks: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    key_balance: torch.Tensor | None = None,
    workspace_tokens: int = WORKSPACE_TOKENS,
    workspace: ExtendWorkspace | None = None,
    half_partials: bool = False,
) -> None:
    """Run a variant into guarded outputs and hold it to the rule."""
    device, layout, scale = query.device, pages.layout, query.shape[-1] ** -0.5
    num_pages = -(-prefix_len // layout.page_tokens)
    table = torch.randperm(len(pages.packed), generator=generator)[:num_pages].to(device, torch.int32)
    if prefix_len % layout.page_tokens:
        pages.forget(int(table[-1]), prefix_len % layout.page_tokens)
    shape = (2, num_sinks + num_raw, layout.num_kv_heads, layout.head_dim)
    raw_keys, raw_values = torch.randn(shape, generator=generator).to(device, query.dtype)
    options = {"sliding_window": sliding_window, "softcap": softcap}
    plan = _plan(
        pages,
        query,
        prefix_len,
        variant,
        workspace_tokens=workspace_tokens,
        raw_bytes=query.element_size(),
        **options,
    )
    plan = dataclasses.replace(plan, half_partials=half_partials)
    arguments = (query, raw_keys, raw_values, pages.packed, table, prefix_len, layout)
    options |= {"softmax_scale": scale, "num_sinks": num_sinks, "key_balance": key_balance}
    out = Guarded(tuple(query.shape), query.dtype, device)
    lse = Guarded(tuple(query.shape[:-1]), torch.float32, device)
    result = extend_attention(
        *arguments, out=out.inner, lse=lse.inner, plan=plan, workspace=workspace, **options
    )
    assert result[0] is out.inner
    assert result[1] is lse.inner
    out.check()
    lse.check()
    truth = reference_attention.extend_attention(*arguments, **options)
    keys, values = pages.tokens(table, prefix_len)
    keys = torch.cat((raw_keys[:num_sinks], keys[num_sinks:], raw_keys[num_sinks:]))
    values = torch.cat((raw_values[:num_sinks], values[num_sinks:], raw_values[num_sinks:]))
    everything = torch.arange(len(keys), device=device)
    seen = seen_tokens(everything[-len(query) :], everything, sliding_window)
    rule = FlashRule()
    rule.add(result, truth, query, keys, values, seen, softmax_scale=scale, softcap=softcap)
    rule.check()


def _query(
    *shape: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


VARIANTS: list[Variant] = ["decode", "direct", "inflate"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_preset_every_way(
    name: str, variant: Variant, generator: torch.Generator, device: torch.device
) -> None:
    pages = make_pages(name, 6, generator, device, page_tokens=32)
    query = _query(5, 6, 64, generator=generator, device=device)

    _check(pages, query, 77, 7, variant, generator, workspace_tokens=32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("prefix_len", "num_raw", "num_new"), [(0, 5, 5), (1, 1, 1), (15, 9, 9), (16, 3, 1), (33, 70, 7)]
)
def test_prefixes_and_tails(
    variant: Variant,
    prefix_len: int,
    num_raw: int,
    num_new: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """No prefix, one token, page edges, and raw tokens before the new ones."""
    pages = make_pages("tq4", 4, generator, device)
    query = _query(num_new, 4, 64, generator=generator, device=device)

    _check(pages, query, prefix_len, num_raw, variant, generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("group", "heads", "head_dim"), [(1, 3, 64), (3, 1, 80), (7, 1, 96), (2, 2, 128), (4, 1, 256)]
)
def test_groups_heads_and_head_sizes(
    variant: Variant,
    group: int,
    heads: int,
    head_dim: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    pages = make_pages("k3v4", 3, generator, device, heads=heads, head_dim=head_dim, page_tokens=32)
    query = _query(6, group * heads, head_dim, generator=generator, device=device)

    _check(pages, query, 60, 6, variant, generator)


@pytest.mark.parametrize("variant", ["direct", "inflate"])
def test_chunks_of_several_tiles(variant: Variant, generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 3, generator, device, heads=1, page_tokens=64)
    query = _query(150, 2, 64, generator=generator, device=device)

    _check(pages, query, 140, 160, variant, generator, workspace_tokens=64)


@pytest.mark.parametrize("variant", ["decode", "direct"])
@pytest.mark.parametrize("sliding_window", [1, 6, 30, 49, 61, 1000])
@pytest.mark.parametrize("num_sinks", [0, 4])
def test_sliding_windows(
    variant: Variant,
    sliding_window: int,
    num_sinks: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Over raw tokens alone, over both, and over sinks, which have positions like all others."""
    pages = make_pages("tq4", 6, generator, device)
    query = _query(12, 4, 64, generator=generator, device=device)

    _check(pages, query, 50, 12, variant, generator, num_sinks=num_sinks, sliding_window=sliding_window)


@pytest.mark.parametrize("variant", ["decode", "direct"])
@pytest.mark.parametrize("name", ["tq4", "fp8"])
def test_a_soft_cap(variant: Variant, name: str, generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages(name, 4, generator, device)
    query = _query(4, 4, 64, generator=generator, device=device)

    _check(pages, query, 40, 4, variant, generator, softcap=3.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("prefix_len", "num_sinks"), [(4, 4), (5, 1), (19, 4), (48, 17)])
@pytest.mark.parametrize("name", ["tq4", "raw"])
def test_raw_sinks_stand_in_for_their_pages(
    variant: Variant,
    prefix_len: int,
    num_sinks: int,
    name: str,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Also where they are the whole prefix, or the whole first run of an inflated one."""
    pages = make_pages(name, 4, generator, device)
    query = _query(6, 4, 64, generator=generator, device=device)

    _check(pages, query, prefix_len, 9, variant, generator, num_sinks=num_sinks, workspace_tokens=16)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_and_a_balance(
    variant: Variant, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    balance = torch.rand(2, 64, generator=generator) * 3 + 0.2
    pages = make_pages("tq4", 4, generator, device, key_balance=balance)
    query = _query(6, 4, 64, generator=generator, device=device, dtype=dtype)

    _check(pages, query, 50, 8, variant, generator, key_balance=balance.to(device))


def test_pages_beyond_two_to_the_31_bytes(generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 3, generator, device)
    pool, first = far_away(pages)
    query = _query(5, 4, 64, generator=generator, device=device)
    raw_keys, raw_values = torch.randn(2, 5, 2, 64, generator=generator).to(device, query.dtype)
    table = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    for variant in VARIANTS:
        plan = _plan(pages, query, 40, variant)
        near, far = (
            extend_attention(
                query,
                raw_keys,
                raw_values,
                packed,
                numbers,
                40,
                pages.layout,
                softmax_scale=0.125,
                plan=plan,
            )
            for packed, numbers in ((pages.packed, table), (pool, table + first))
        )

        assert torch.equal(near[0], far[0])
        assert torch.equal(near[1], far[1])


def test_partial_results_in_half_precision(generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 4, generator, device)
    query = _query(6, 4, 64, generator=generator, device=device)

    _check(pages, query, 50, 8, "direct", generator, half_partials=True)


def test_a_workspace_serves_again_and_keeps_its_bound(
    generator: torch.Generator, device: torch.device
) -> None:
    pages = make_pages("tq4", 8, generator, device)
    workspace = extend_workspace(pages.layout, 30, device)
    workspace.keys.fill_(torch.nan)
    workspace.values.fill_(torch.nan)
    query = _query(6, 4, 64, generator=generator, device=device)

    assert workspace.keys.shape[1] == 32
    for prefix_len in (100, 20):
        pages = make_pages("tq4", 8, generator, device)
        _check(pages, query, prefix_len, 8, "inflate", generator, workspace=workspace, workspace_tokens=32)


def test_without_triton_a_cpu_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pages = make_pages("tq4", 2, generator, torch.device("cpu"))
    raw = torch.randn(2, 3, 2, 64, generator=generator)
    query, table = torch.randn(3, 4, 64, generator=generator), torch.tensor([1, 0])
    arguments = (query, raw[0], raw[1], pages.packed, table, 20, pages.layout)
    out, lse = extend_attention(*arguments, softmax_scale=0.125)
    truth = reference_attention.extend_attention(*arguments, softmax_scale=0.125)

    assert torch.equal(out, truth[0])
    assert torch.equal(lse, truth[1])


def test_the_default_plan_is_asked_for(generator: torch.Generator, device: torch.device) -> None:
    pages = make_pages("tq4", 2, generator, device)
    raw = torch.randn(2, 3, 2, 64, generator=generator).to(device)
    query = _query(3, 4, 64, generator=generator, device=device, dtype=torch.float32)
    table = torch.tensor([1, 0], device=device)
    arguments = (query, raw[0], raw[1], pages.packed, table, 20, pages.layout)
    result = extend_attention(*arguments, softmax_scale=0.125)
    plan = plan_extend(
        pages.layout, machine_of(device), num_new=3, num_query_heads=4, prefix_len=20, raw_bytes=4
    )
    again = extend_attention(*arguments, softmax_scale=0.125, plan=plan)

    assert plan.variant == "decode"
    assert torch.equal(result[0], again[0])


LAYOUT = PageLayout(spec=preset("tq4"), head_dim=128, num_kv_heads=8, page_tokens=128)


def _h100_plan(num_new: int, prefix_len: int, **options: Any) -> ExtendPlan:
    return plan_extend(LAYOUT, H100, num_new=num_new, num_query_heads=32, prefix_len=prefix_len, **options)


@pytest.mark.parametrize(
    ("num_new", "prefix_len", "options", "variant"),
    [
        (1, 32768, {}, "decode"),
        (16, 32768, {}, "decode"),
        (17, 32768, {}, "direct"),
        (128, 131072, {}, "direct"),
        (512, 32768, {}, "inflate"),
        (8192, 131072, {}, "inflate"),
        (8192, 1024, {}, "direct"),
        (512, 32768, {"sliding_window": 4096}, "direct"),
        (512, 32768, {"softcap": 50.0}, "direct"),
        (512, 32768, {"variant": "direct"}, "direct"),
    ],
)
def test_the_variant_follows_from_the_shapes(
    num_new: int, prefix_len: int, options: dict[str, Any], variant: Variant
) -> None:
    plan = _h100_plan(num_new, prefix_len, **options)

    assert plan.variant == variant
    assert (plan.decode is not None) == (variant == "decode")
    assert plan == _h100_plan(num_new, prefix_len, **options)


def test_nothing_is_inflated_without_a_gpu_unless_asked_for() -> None:
    cpu = machine_of(torch.device("cpu"))
    plan = plan_extend(LAYOUT, cpu, num_new=512, num_query_heads=32, prefix_len=32768)

    assert plan.variant == "direct"
    assert plan.library == "cpu"


@pytest.mark.parametrize(
    ("capability", "head_dim", "library"),
    [((9, 0), 128, "cudnn"), ((9, 0), 256, "flash"), ((8, 0), 128, "flash"), ((12, 0), 64, "flash")],
)
def test_the_library_that_attends_inflated_tokens(
    capability: tuple[int, int], head_dim: int, library: str
) -> None:
    layout = dataclasses.replace(LAYOUT, head_dim=head_dim)
    machine = Machine(capability=capability, num_processors=100)
    plan = plan_extend(layout, machine, num_new=512, num_query_heads=32, prefix_len=32768)

    assert plan.variant == "inflate"
    assert plan.library == library


def test_a_few_columns_over_a_long_prefix_are_split_to_fill_the_machine() -> None:
    plan = _h100_plan(32, 131072)
    programs = -(-plan.columns // plan.tile_columns) * LAYOUT.num_kv_heads

    assert plan.num_splits > 1
    assert programs * plan.num_splits >= 0.6 * H100.num_processors


def test_splits_share_what_a_window_leaves() -> None:
    assert _h100_plan(32, 131072, sliding_window=128).num_splits <= 3


@pytest.mark.parametrize("workspace_tokens", [1, 128, 1000, 16384])
def test_runs_are_whole_pages_within_the_bound(workspace_tokens: int) -> None:
    plan = _h100_plan(512, 32768, workspace_tokens=workspace_tokens)

    assert plan.run_tokens % LAYOUT.page_tokens == 0
    assert plan.run_tokens <= max(workspace_tokens, LAYOUT.page_tokens)


def test_raw_numbers_of_four_bytes_take_small_tiles() -> None:
    plans = _h100_plan(512, 32768, raw_bytes=2), _h100_plan(512, 32768, raw_bytes=4)

    assert [plan.raw_columns * plan.raw_tokens for plan in plans] == [128 * 64, 32 * 32]


def test_long_chunks_keep_partial_results_small() -> None:
    assert _h100_plan(4096, 32768, sliding_window=1024).half_partials
    assert not _h100_plan(64, 32768).half_partials
    assert not _h100_plan(4096, 32768).half_partials


@pytest.mark.parametrize(
    ("num_new", "options", "message"),
    [
        (8, {"variant": "inflate", "softcap": 1.0}, "not inflated for a sliding window or a soft cap"),
        (8, {"variant": "inflate", "sliding_window": 5}, "not inflated for a sliding window"),
        (17, {"variant": "decode"}, "up to 16 rows, not 17"),
    ],
)
def test_a_variant_that_cannot_is_refused(num_new: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _h100_plan(num_new, 1024, **options)


def _arguments() -> dict[str, Any]:
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    return {
        "query": torch.zeros(3, 4, 64),
        "keys": torch.zeros(5, 2, 64),
        "values": torch.zeros(5, 2, 64),
        "pages": torch.zeros(2, layout.page_bytes, dtype=torch.uint8),
        "block_table": torch.zeros(2, dtype=torch.int32),
        "prefix_len": 20,
        "layout": layout,
        "softmax_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 4, 32)}, r"query must be \[any, any, 64\]"),
        ({"query": torch.zeros(3, 5, 64)}, "1 to 16 times the 2 KV heads, not 5"),
        ({"query": torch.zeros(6, 4, 64)}, "6 queries need at least one row and as many raw keys, not 5"),
        ({"query": torch.zeros(0, 4, 64)}, "0 queries need at least one row"),
        ({"query": torch.zeros(3, 4, 64).half()}, "keys must be .* float16, not"),
        ({"num_sinks": 3}, "3 queries need at least one row and as many raw keys, not 2"),
        ({"num_sinks": 21}, "21 sinks do not lie within a prefix of 20 tokens"),
        ({"num_sinks": -1}, "-1 sinks do not lie within"),
        ({"prefix_len": 33}, "a prefix of 33 tokens, or these not within 2 pages"),
        ({"values": torch.zeros(4, 2, 64)}, r"values must be \[5, 2, 64\]"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, r"block_table must be \[any\]"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"key_balance": torch.zeros(64)}, r"key_balance must be \[2, 64\]"),
        ({"out": torch.zeros(3, 4, 32)}, r"out must be \[3, 4, 64\]"),
        ({"lse": torch.zeros(3, 4).half()}, r"lse must be \[3, 4\] float32"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_attention(**(_arguments() | changes))


def test_a_plan_for_something_else_is_refused() -> None:
    arguments = _arguments()
    layout = arguments["layout"]
    plan = plan_extend(layout, H100, num_new=3, num_query_heads=4, prefix_len=20, variant="inflate")
    with pytest.raises(ValueError, match="the plan is for 12 columns"):
        extend_attention(**arguments, plan=dataclasses.replace(plan, columns=12))
    with pytest.raises(ValueError, match="tiles of 48"):
        extend_attention(**arguments, plan=dataclasses.replace(plan, tile_tokens=48))
    with pytest.raises(ValueError, match="not inflated for a sliding window"):
        extend_attention(**arguments, plan=plan, sliding_window=5)


def test_a_workspace_that_is_too_small_is_refused() -> None:
    arguments = _arguments()
    layout = arguments["layout"]
    plan = plan_extend(
        layout, H100, num_new=3, num_query_heads=4, prefix_len=20, workspace_tokens=32, variant="inflate"
    )
    workspace = extend_workspace(layout, 1, torch.device("cpu"))
    plan = dataclasses.replace(plan, run_tokens=32)
    with pytest.raises(ValueError, match=r"the workspace is \(1, 16, 2, 64\)"):
        extend_attention(**arguments, plan=plan, workspace=workspace)
