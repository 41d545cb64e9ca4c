"""Launches of many tokens that have a kernel of their own on Hopper give the reference's bytes.

On other devices the same launches take the kernel that serves all of them, whose tests are elsewhere.
"""

import math
from typing import Any

import pytest
import torch

from tq_kernels import (
    KeyCenter,
    PageLayout,
    _launch_quantize,
    hopper_launch_quantize,
    hopper_quantize,
    quantize,
    reference,
    reference_slots,
)
from tq_kernels import cache_layers as cache_layers_module
from tq_kernels._page_shape import page_shape
from tq_kernels.cache_layers import cache_layers, quantize_layers
from tq_kernels.decode_plan import choose_variant, machine_of
from tq_kernels.quantize import hopper_packs, quantize_slots
from tq_kernels.quantize_plan import plan_quantize
from tq_kernels.reference import plane_view, read_side
from tq_kernels.spec import Code, CodecSpec

from .slot_cases import ExactTokens, GuardedPages, exact_tokens, guarded, layout_of
from .tolerances import QUANTIZE_FLIPS, SCALE_ULPS

SERVED = [(64, 64), (64, 128), (128, 64), (128, 128)]
"""Tokens of a page, channels of a head."""
SIZES = SERVED if torch.cuda.is_available() else SERVED[:1]
MANY = 513


def _packed(
    exact: ExactTokens,
    slots: list[int],
    layout: PageLayout,
    device: torch.device,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    key_balance: torch.Tensor | None = None,
    seed_pages: list[int] | None = None,
    slot_dtype: torch.dtype = torch.int64,
    **more: Any,
) -> GuardedPages:
    """Guarded pages after a launch of many tokens; those besides are skipped, and no numbers."""
    count = max(MANY, first + len(slots) + 1)
    place = slice(first, first + len(slots))
    sides = torch.full((2, count, *exact.keys.shape[1:]), torch.nan, dtype=dtype)
    sides[0, place], sides[1, place] = exact.keys, exact.values
    mapping = torch.full((count,), -1, dtype=slot_dtype)
    mapping[place] = torch.tensor(slots, dtype=slot_dtype)
    seeds = None
    if seed_pages is not None:
        seeds = torch.full((count,), -1, dtype=torch.int32)
        seeds[place] = torch.tensor(seed_pages, dtype=torch.int32)
        seeds = seeds.to(device)
    keys, values = sides.to(device)
    balance = None if key_balance is None else key_balance.to(device)
    assert hopper_packs(layout, keys, values, balance) == _is_hopper(device, layout)
    result = guarded(exact.pages, device)
    mapping = mapping.to(device)
    quantize_slots(keys, values, mapping, result.pages, layout, key_balance=balance, seed_pages=seeds, **more)
    return result


def _is_hopper(device: torch.device, layout: PageLayout) -> bool:
    return choose_variant(machine_of(device), layout) == "hopper"


def _expected(
    exact: ExactTokens, slots: list[int], layout: PageLayout, seed_pages: list[int] | None = None
) -> torch.Tensor:
    pages = exact.pages.clone()
    seeds = None if seed_pages is None else torch.tensor(seed_pages)
    reference_slots.quantize_slots(
        exact.keys, exact.values, torch.tensor(slots), pages, layout, seed_pages=seeds
    )
    return pages


def _assert_agree(found: torch.Tensor, expected: torch.Tensor, layout: PageLayout) -> None:
    """The same bytes, scales within their tolerance."""
    found, expected = found.cpu().clone(), expected.clone()
    for side in ("key", "value"):
        scales = [plane_view(pages, layout, f"{side}_scales") for pages in (found, expected)]
        assert (scales[0].int() - scales[1].int()).abs().max() <= SCALE_ULPS
        for view in scales:
            view.zero_()
    assert torch.equal(found, expected)


def _runs(page_tokens: int) -> list[int]:
    """Runs of every kind: whole in order and in disorder, beginnings, a middle, ends, some among others."""
    p = page_tokens
    disorder = torch.randperm(p, generator=torch.Generator().manual_seed(3)).tolist()
    return [
        *range(p, 2 * p),
        -1,
        *range(3 * p, 4 * p - 3),
        *(2 * p + offset for offset in disorder),
        *range(3, 7),
        5 * p - 1,
        -1,
        *(slot for i in range(4) for slot in (5 * p + i, 6 * p + i + p // 2 - 2, -1)),
        7 * p,
        *(9 * p + 4, 9 * p + 5, *range(9 * p - 2, 9 * p + 2)),
    ]


@pytest.mark.parametrize(("first", "slot_dtype"), [(0, torch.int64), (37, torch.int64), (37, torch.int32)])
@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_runs_of_every_kind_give_the_bytes_of_the_reference(
    page_tokens: int,
    head_dim: int,
    first: int,
    slot_dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    layout = layout_of("tq4", head_dim, 1, page_tokens)
    slots = _runs(page_tokens)
    exact = exact_tokens(layout, slots, 10, generator)
    result = _packed(exact, slots, layout, device, first=first, slot_dtype=slot_dtype)
    result.assert_outside_is_untouched()
    _assert_agree(result.pages, _expected(exact, slots, layout), layout)


def test_more_pages_than_a_device_takes_at_once(generator: torch.Generator, device: torch.device) -> None:
    """Whole pages in any order, those of two heads; on a CPU only a few, as it takes its time."""
    layout = layout_of("tq4", 128, 2, 64)
    num_pages = 600 if device.type == "cuda" else 3
    order = torch.randperm(num_pages, generator=generator)
    slots = (order[:, None] * 64 + torch.arange(64)).flatten().tolist()
    exact = exact_tokens(layout, slots, num_pages, generator)
    result = _packed(exact, slots, layout, device)
    result.assert_outside_is_untouched()
    _assert_agree(result.pages, _expected(exact, slots, layout), layout)


@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_a_page_without_a_centre(
    page_tokens: int, head_dim: int, generator: torch.Generator, device: torch.device
) -> None:
    spec = CodecSpec(key=Code.LM4, value=Code.LM4, key_center=KeyCenter.NONE)
    layout = PageLayout(spec=spec, head_dim=head_dim, num_kv_heads=2, page_tokens=page_tokens)
    slots = [*range(page_tokens), *range(page_tokens + 3, 2 * page_tokens)]
    exact = exact_tokens(layout, slots, 2, generator)
    result = _packed(exact, slots, layout, device, dtype=torch.float16)
    result.assert_outside_is_untouched()
    _assert_agree(result.pages, _expected(exact, slots, layout), layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_seeds_and_sinks_of_a_step(
    page_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Pages that are opened and not filled take a seed's centre; sinks are kept, of skipped tokens too."""
    layout, p = layout_of("tq4", head_dim, 2, page_tokens), page_tokens
    slots = [*range(5), *range(p, 2 * p), 2 * p, 3 * p, 3 * p + 1]
    seeds = {0: 4, p: 5, 2 * p: 5, 2 * p + 1: 4}
    seed_pages = [seeds.get(slot, -1) for slot in slots]
    exact = exact_tokens(layout, slots, 6, generator, {0: 4, 2: 5})
    first, count = 9, max(MANY, 10 + len(slots))
    sink_slots = torch.full((count,), -1, dtype=torch.int32)
    for token, slot in ((first, 4), (first + 1, 5), (first + 80, 0)):
        sink_slots[token] = slot
    sinks = torch.full((2, 11, 2, head_dim), 7.0, dtype=dtype, device=device)
    result = _packed(
        exact,
        slots,
        layout,
        device,
        first=first,
        dtype=dtype,
        seed_pages=seed_pages,
        sink_slots=sink_slots.to(device),
        sink_keys=sinks[0],
        sink_values=sinks[1],
    )
    result.assert_outside_is_untouched()
    _assert_agree(result.pages, _expected(exact, slots, layout, seed_pages), layout)
    for side, kept in zip((exact.keys, exact.values), sinks.cpu(), strict=True):
        assert torch.equal(kept[[4, 5]], side[[0, 1]].to(dtype))
        nobody = torch.full((2, head_dim), torch.nan)
        twentieth = side[80].to(dtype) if len(slots) > 80 else nobody
        assert torch.equal(kept[0].nan_to_num(1e3), twentieth.nan_to_num(1e3).to(dtype))
        assert (kept[[1, 2, 3, 6, 7, 8, 9, 10]] == 7).all()


@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_keys_are_divided_by_their_balance(
    page_tokens: int, head_dim: int, generator: torch.Generator, device: torch.device
) -> None:
    layout, p = layout_of("tq4", head_dim, 2, page_tokens), page_tokens
    slots = [*range(p), p + 4, p + 5]
    exact = exact_tokens(layout, slots, 2, generator)
    expected = _expected(exact, slots, layout)
    balance = torch.exp2(torch.randint(-3, 4, (2, head_dim), generator=generator).float())
    exact.keys = exact.keys * balance
    result = _packed(exact, slots, layout, device, key_balance=balance)
    result.assert_outside_is_untouched()
    _assert_agree(result.pages, expected, layout)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_layers_are_read_out_of_their_caches(
    page_tokens: int,
    head_dim: int,
    balanced: bool,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Tokens in any order of a cache of small pages, keys and values in one tensor, some to skip."""
    layout, num_layers, cache_tokens = layout_of("tq4", head_dim, 2, page_tokens), 3, 16
    slots = [
        *range(page_tokens, 2 * page_tokens),
        -1,
        *range(2, page_tokens),
        *range(2 * page_tokens, 2 * page_tokens + 9),
    ]
    count, num_pages = len(slots), len(slots) // cache_tokens + 3
    sources = torch.randperm(num_pages * cache_tokens, generator=generator)[:count]
    shape = (num_layers, num_pages, 2, cache_tokens, 2, head_dim)
    cache = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
    exact = [exact_tokens(layout, slots, 3, generator) for _ in range(num_layers)]
    balance = torch.exp2(torch.randint(-2, 3, (num_layers, 2, head_dim), generator=generator).float())
    for layer, tokens in enumerate(exact):
        keys = tokens.keys * balance[layer] if balanced else tokens.keys
        for side, rows in enumerate((keys, tokens.values)):
            cache[layer, sources // cache_tokens, side, sources % cache_tokens] = rows.to(cache)
    pages = torch.stack([tokens.pages for tokens in exact]).to(device)
    caches = cache_layers([layer[:, 0] for layer in cache], [layer[:, 1] for layer in cache])
    quantize_layers(
        caches,
        sources.to(device),
        torch.tensor(slots, device=device),
        pages,
        layout,
        key_balance=balance.to(device) if balanced else None,
    )
    for layer, tokens in enumerate(exact):
        _assert_agree(pages[layer], _expected(tokens, slots, layout), layout)


@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_ordinary_tokens_differ_next_to_boundaries_only(
    page_tokens: int, head_dim: int, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of("tq4", head_dim, 2, page_tokens)
    count = 5 * page_tokens
    keys, values = torch.randn(2, count, 2, head_dim, generator=generator)
    keys = (keys + 3 * torch.randn(2, head_dim, generator=generator)).bfloat16().float()
    values = values.bfloat16().float()
    pages = torch.zeros(5, layout.page_bytes, dtype=torch.uint8)
    exact = ExactTokens(keys=keys, values=values, pages=pages)
    found = _packed(exact, list(range(count)), layout, device).pages.cpu()
    expected = reference.quantize(keys, values, layout)
    for side in ("key", "value"):
        words = [plane_view(each, layout, f"{side}_words") for each in (found, expected)]
        differ = sum(int((((words[0] ^ words[1]) >> shift) & 0xF).ne(0).sum()) for shift in range(0, 32, 4))
        assert differ <= QUANTIZE_FLIPS * keys.numel()
        scales = [plane_view(each, layout, f"{side}_scales").int() for each in (found, expected)]
        far = (scales[0] - scales[1]).abs() > SCALE_ULPS
        assert int(far.sum()) <= max(1, QUANTIZE_FLIPS * count * head_dim)
    centers = [plane_view(each, layout, "key_center").int() for each in (found, expected)]
    assert (centers[0] - centers[1]).abs().max() <= SCALE_ULPS


@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_zeros_and_huge_numbers_stay_finite(page_tokens: int, head_dim: int, device: torch.device) -> None:
    layout = layout_of("tq4", head_dim, 1, page_tokens)
    vectors = torch.zeros(page_tokens, 1, head_dim)
    vectors[4:, :, 0] = 1e9
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    tokens = ExactTokens(keys=vectors, values=vectors, pages=pages)
    found = _packed(tokens, list(range(page_tokens)), layout, device).pages.cpu()
    keys, values = reference.dequantize(found, layout)

    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert not values[:4].any()
    assert torch.linalg.vector_norm(values[4:], dim=-1).min() > 65504


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("page_tokens", "head_dim"), SIZES)
def test_numbers_that_are_none_spoil_no_other_vector(
    page_tokens: int, head_dim: int, number: float, generator: torch.Generator, device: torch.device
) -> None:
    """Of keys all of the page, whose centre they share; of values the token alone."""
    layout = layout_of("tq4", head_dim, 1, page_tokens)
    keys, values = torch.randn(2, 2 * page_tokens, 1, head_dim, generator=generator)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    tokens = ExactTokens(keys=keys, values=values, pages=pages)
    slots = list(range(2 * page_tokens))
    sound = _packed(tokens, slots, layout, device).pages.cpu()
    keys[3, 0, 5] = values[4, 0, 6] = number
    found = _packed(tokens, slots, layout, device).pages.cpu()

    assert torch.equal(found[1], sound[1])
    others = torch.arange(page_tokens) != 4
    for spoilt, clean in zip(
        read_side(found[:1], layout, "value"), read_side(sound[:1], layout, "value"), strict=True
    ):
        assert spoilt is not None
        assert clean is not None
        assert torch.equal(spoilt[0, :, others], clean[0, :, others])
    if math.isnan(number):  # an infinity may go either way, as the order of sums has it
        assert read_side(found[:1], layout, "value")[1][0, :, 4].isnan().all()


def test_what_the_kernel_serves() -> None:
    """Vectors of half precision whose strides let 16 bytes be copied at a time, and four bits a channel."""
    layout = layout_of("tq4", 128, 2, 64)
    tokens = torch.zeros(4, 2, 128, dtype=torch.bfloat16)

    def serves(layout: PageLayout, tokens: torch.Tensor, *, balanced: bool = False) -> bool:
        return hopper_quantize.serves(layout, tokens, tokens, balanced=balanced)

    assert serves(layout, tokens)
    assert serves(layout, tokens, balanced=True)
    assert serves(layout, tokens.half())
    assert not serves(layout, tokens.half(), balanced=True)
    assert not serves(layout, tokens.float())
    assert not serves(layout, torch.zeros(4, 2, 136, dtype=torch.bfloat16)[..., :128])
    assert not serves(layout, torch.zeros(4 * 256 + 4, dtype=torch.bfloat16)[4:].view(4, 2, 128))
    assert not serves(layout_of("tq4", 128, 2, 32), tokens)
    assert not serves(layout_of("tq4", 256, 2, 64), tokens)
    assert not serves(layout_of("k4v3", 128, 2, 64), tokens)


@pytest.mark.parametrize(
    ("page_tokens", "num_tokens", "whole", "variant"),
    [
        (64, 512, False, "append"),
        (64, 513, False, "hopper_pages"),
        (128, 32768, False, "hopper_pages"),
        (64, 64, True, "hopper_pages"),
        (128, 128, True, "hopper_pages"),
    ],
)
def test_the_plan_takes_it_for_many_tokens_and_for_whole_chunks(
    page_tokens: int, num_tokens: int, whole: bool, variant: str
) -> None:
    shape = page_shape(layout_of("tq4", 128, 8, page_tokens))
    plan = plan_quantize(num_tokens, shape, hopper_pages=True, whole=whole)

    assert (plan.variant, plan.search) == (variant, variant != "append")
    if variant != "append":
        assert (plan.programs, plan.windows, plan.window) == (-(-num_tokens // page_tokens), 1, page_tokens)
        assert (plan.rows, plan.num_warps) == (page_tokens, page_tokens // 16)


@pytest.mark.parametrize(("page_tokens", "head_dim"), SERVED)
@pytest.mark.parametrize("balanced", [False, True])
def test_engines_launch_it_on_hopper(
    page_tokens: int, head_dim: int, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of many tokens, and what is saved, however little; not those of float32."""
    launches: list[dict[str, Any]] = []
    monkeypatch.setattr(quantize, "takes_kernel", lambda _: True)
    monkeypatch.setattr(cache_layers_module, "takes_kernel", lambda _: True)
    monkeypatch.setattr(quantize, "choose_variant", lambda *_: "hopper")
    monkeypatch.setattr(hopper_launch_quantize, "launch_windows", lambda *_, **named: launches.append(named))
    monkeypatch.setattr(_launch_quantize, "launch_quantize", lambda *_, **__: launches.append({}))
    layout, count = layout_of("tq4", head_dim, 2, page_tokens), MANY
    balance = torch.ones(1, 2, head_dim) if balanced else None
    pages = torch.zeros(1, 8, layout.page_bytes, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32):
        tokens, slots = torch.zeros(count, 2, head_dim, dtype=dtype), torch.full((count,), -1)
        of_layer = None if balance is None else balance[0]
        quantize_slots(tokens, tokens, slots, pages[0], layout, key_balance=of_layer)
        cache = cache_layers([tokens[None]], [tokens[None]])
        quantize_layers(cache, slots[:3], slots[:3], pages, layout, key_balance=balance)

    step, saved, *others = launches
    assert others == [{}, {}]
    assert [launch["key_balance"] is not None for launch in (step, saved)] == [balanced] * 2
    assert "layers" not in step
    assert saved["source_slots"].tolist() == [-1] * 3
