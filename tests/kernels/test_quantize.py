"""The quantize kernel writes the bytes of the reference, and no others, whatever a launch brings."""

import math
from typing import Any

import pytest
import torch

from tq_kernels import (
    PRESETS,
    CodecSpec,
    KeyCenter,
    PageLayout,
    _launch_quantize,
    cells,
    quantize,
    reference,
    reference_slots,
)
from tq_kernels._page_shape import page_shape
from tq_kernels.codebook import LEVELS, TARGETS, VALUE_GAINS, midpoints
from tq_kernels.quantize import hopper_appends, quantize_slots
from tq_kernels.quantize_plan import LaunchPlan, plan_quantize
from tq_kernels.reference import plane_view, read_key_center, read_side, rotation_of
from tq_kernels.spec import Code

from .slot_cases import CPU, ExactTokens, GuardedPages, exact_tokens, guarded, layout_of
from .tolerances import QUANTIZE_FLIPS, SCALE_ULPS, boundary_distance

VARIANTS = ["append", "pages"]
SMALLEST_PAGES_LAUNCH = 513


def _launch(
    variant: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: list[int],
    pages: torch.Tensor,
    layout: PageLayout,
    device: torch.device,
    *,
    seed_pages: list[int] | None = None,
    key_balance: torch.Tensor | None = None,
    slot_dtype: torch.dtype = torch.int64,
) -> GuardedPages:
    """Guarded pages after a launch of the variant, which slots to skip make large enough."""
    skipped = SMALLEST_PAGES_LAUNCH if variant == "pages" else 3
    first = skipped // 2
    tokens = [torch.full((skipped + len(slots), *keys.shape[1:]), torch.nan, dtype=keys.dtype) for _ in "kv"]
    for padded, side in zip(tokens, (keys, values), strict=True):
        padded[first : first + len(slots)] = side
    mapping = torch.full((skipped + len(slots),), -1, dtype=slot_dtype)
    mapping[first : first + len(slots)] = torch.tensor(slots, dtype=slot_dtype)
    seeds = None
    if seed_pages is not None:
        seeds = torch.full((len(mapping),), -1, dtype=torch.int32)
        seeds[first : first + len(slots)] = torch.tensor(seed_pages, dtype=torch.int32)
        seeds = seeds.to(device)
    result = guarded(pages, device)
    assert plan_quantize(len(mapping), page_shape(layout)).variant == variant
    quantize_slots(
        tokens[0].to(device),
        tokens[1].to(device),
        mapping.to(device),
        result.pages,
        layout,
        seed_pages=seeds,
        key_balance=None if key_balance is None else key_balance.to(device),
    )
    return result


def _reference(
    exact: ExactTokens, slots: list[int], layout: PageLayout, seed_pages: list[int] | None = None, **more: Any
) -> torch.Tensor:
    pages = exact.pages.clone()
    seeds = None if seed_pages is None else torch.tensor(seed_pages)
    reference_slots.quantize_slots(
        exact.keys, exact.values, torch.tensor(slots), pages, layout, seed_pages=seeds, **more
    )
    return pages


def _assert_same(result: GuardedPages, expected: torch.Tensor, layout: PageLayout) -> None:
    """The same bytes; scales of E4M3_SCALED, whose sums of squares are not exact, within their tolerance."""
    found, expected = result.pages.cpu().clone(), expected.clone()
    for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
        if code is Code.E4M3_SCALED:
            scales = [plane_view(pages, layout, f"{side}_scales") for pages in (found, expected)]
            assert (scales[0].int() - scales[1].int()).abs().max() <= SCALE_ULPS
            for view in scales:
                view.zero_()
    assert torch.equal(found, expected)
    result.assert_outside_is_untouched()


def _mixed_slots(page_tokens: int) -> list[int]:
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
        *(slot for i in range(4) for slot in (5 * p + i, 6 * p + i + 2, -1)),
        7 * p,
        *(9 * p + 4, 9 * p + 5, *range(9 * p - 2, 9 * p + 2)),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_runs_of_every_kind_give_the_bytes_of_the_reference(
    name: str, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name, heads=1)
    slots = _mixed_slots(layout.page_tokens)
    exact = exact_tokens(layout, slots, 10, generator)
    result = _launch(
        variant, exact.keys.bfloat16(), exact.values.bfloat16(), slots, exact.pages, layout, device
    )
    _assert_same(result, _reference(exact, slots, layout, search=variant == "pages"), layout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "page_tokens"),
    [
        ("tq4", 128, 1, 64),
        ("tq3", 64, 3, 16),
        ("k4v2", 128, 1, 32),
        ("k8v4", 256, 1, 16),
        ("k3v4", 64, 1, 128),
        ("fp8", 80, 3, 32),
        ("raw", 96, 1, 64),
    ],
)
def test_pages_of_other_sizes_give_the_bytes_of_the_reference(
    name: str,
    head_dim: int,
    heads: int,
    page_tokens: int,
    variant: str,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    layout = layout_of(name, head_dim, heads, page_tokens)
    p = page_tokens
    slots = [*range(p, 2 * p), p - 1, *range(2 * p + 1, 2 * p + 4), *range(3 * p, 3 * p + 5)]
    exact = exact_tokens(layout, slots, 4, generator)
    result = _launch(
        variant, exact.keys.bfloat16(), exact.values.bfloat16(), slots, exact.pages, layout, device
    )
    _assert_same(result, _reference(exact, slots, layout, search=variant == "pages"), layout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["k4v3", "k8v4", "raw"])
def test_other_dtypes_give_the_bytes_of_the_reference(
    name: str, dtype: torch.dtype, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    slots = [*range(16, 32), 3, 4]
    exact = exact_tokens(layout, slots, 2, generator)
    result = _launch(
        variant,
        exact.keys.to(dtype),
        exact.values.to(dtype),
        slots,
        exact.pages,
        layout,
        device,
        slot_dtype=torch.int32,
    )
    _assert_same(result, _reference(exact, slots, layout, search=variant == "pages"), layout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_sinks_are_kept_as_they_are_besides(
    head_dim: int,
    dtype: torch.dtype,
    kept: torch.dtype,
    variant: str,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Those of several sequences, skipped tokens too; no other row is touched, and pages are the same."""
    layout = layout_of("tq4", head_dim)
    count = 8 if variant == "append" else SMALLEST_PAGES_LAUNCH + 7
    keys, values = torch.randn(2, count, 2, head_dim, generator=generator).to(dtype).to(device)
    slots = torch.full((count,), -1)
    slots[:6] = torch.arange(6)
    sink_slots = torch.full((count,), -1, dtype=torch.int32)
    for token, slot in ((0, 4), (1, 5), (5, 0), (count - 1, 9)):
        sink_slots[token] = slot
    sinks = torch.full((2, 11, 2, head_dim), 7.0, dtype=kept, device=device)
    expected = sinks.clone()
    for token, slot in ((0, 4), (1, 5), (5, 0), (count - 1, 9)):
        expected[0, slot], expected[1, slot] = keys[token].to(kept), values[token].to(kept)
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    slots, sink_slots = slots.to(device), sink_slots.to(device)
    quantize_slots(keys, values, slots, pages[0], layout)
    quantize_slots(
        keys,
        values,
        slots,
        pages[1],
        layout,
        sink_slots=sink_slots,
        sink_keys=sinks[0],
        sink_values=sinks[1],
    )
    assert torch.equal(sinks, expected)
    assert torch.equal(pages[0], pages[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("key", "value"),
    [(Code.BF16, Code.LM4), (Code.E4M3, Code.LM3), (Code.LM2, Code.E4M3_SCALED), (Code.LM3, Code.BF16)],
)
def test_any_two_codes_give_the_bytes_of_the_reference(
    key: Code, value: Code, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    center = KeyCenter.NONE
    layout = PageLayout(
        spec=CodecSpec(key=key, value=value, key_center=center), head_dim=64, num_kv_heads=1, page_tokens=16
    )
    slots = [*range(16), 20, 21]
    exact = exact_tokens(layout, slots, 2, generator)
    result = _launch(
        variant, exact.keys.bfloat16(), exact.values.bfloat16(), slots, exact.pages, layout, device
    )
    _assert_same(result, _reference(exact, slots, layout, search=variant == "pages"), layout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tq4", "k8v4"])
def test_seeds_give_their_centre_to_pages_that_are_not_filled(
    name: str, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    slots = [*range(5), *range(16, 32), 32, 48, 49]
    seeds = {slot: seed for slot, seed in ((0, 4), (16, 5), (32, 5), (33, 4))}
    seed_pages = [seeds.get(slot, -1) for slot in slots]
    exact = exact_tokens(layout, slots, 6, generator, {0: 4, 2: 5})
    result = _launch(
        variant,
        exact.keys.bfloat16(),
        exact.values.bfloat16(),
        slots,
        exact.pages,
        layout,
        device,
        seed_pages=seed_pages,
    )
    _assert_same(result, _reference(exact, slots, layout, seed_pages, search=variant == "pages"), layout)
    centers, before = (read_key_center(pages, layout) for pages in (result.pages.cpu(), exact.pages))
    assert centers is not None
    assert before is not None
    assert torch.equal(centers[[0, 2]], before[[4, 5]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tq4", "k8v4", "fp8"])
def test_keys_are_divided_by_their_balance(
    name: str, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    slots = [*range(16), 20, 21]
    exact = exact_tokens(layout, slots, 2, generator)
    balance = torch.exp2(torch.randint(-3, 4, (2, 64), generator=generator).float())
    expected = _reference(exact, slots, layout, search=variant == "pages")
    result = _launch(
        variant,
        (exact.keys * balance).bfloat16(),
        exact.values.bfloat16(),
        slots,
        exact.pages,
        layout,
        device,
        key_balance=balance,
    )
    _assert_same(result, expected, layout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_views_are_read_where_they_lie(
    variant: str, generator: torch.Generator, device: torch.device
) -> None:
    """A fused projection holds all heads of a token side by side; values may be laid out by head."""
    layout = layout_of("tq4")
    slots = [*range(16), *range(20, 26)]
    exact = exact_tokens(layout, slots, 2, generator)
    num_tokens = len(slots) if variant == "append" else SMALLEST_PAGES_LAUNCH
    fused = torch.full((num_tokens, 4 + 2 + 2, 64), torch.nan, dtype=torch.bfloat16, device=device)
    by_head = torch.full((2, num_tokens, 64), torch.nan, dtype=torch.bfloat16, device=device)
    keys, values = fused[:, 4:6], by_head.transpose(0, 1)
    keys[: len(slots)], values[: len(slots)] = exact.keys.to(keys), exact.values.to(values)
    mapping = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
    mapping[: len(slots)] = torch.tensor(slots)
    result = guarded(exact.pages, device)
    assert plan_quantize(num_tokens, page_shape(layout)).variant == variant
    quantize_slots(keys, values, mapping, result.pages, layout)

    _assert_same(result, _reference(exact, slots, layout, search=variant == "pages"), layout)


@pytest.mark.parametrize("name", ["tq4", "k3v2"])
def test_a_page_grows_token_by_token(name: str, generator: torch.Generator, device: torch.device) -> None:
    """Decode steps of two sequences, whose new pages are seeded by the pages before."""
    layout = layout_of(name, heads=1)
    slots = [slot for step in range(16) for slot in (32 + step, 48 + step)]
    seed_pages = torch.full((32,), -1, dtype=torch.int32)
    seed_pages[:2] = torch.tensor([0, 1])
    exact = exact_tokens(layout, slots, 4, generator, {2: 0, 3: 1})
    result, expected = guarded(exact.pages, device), exact.pages.clone()
    assert plan_quantize(2, page_shape(layout)).variant == "append"
    for step in range(0, 32, 2):
        sides = [side[step : step + 2] for side in (exact.keys, exact.values)]
        mapping, seeds = torch.tensor(slots[step : step + 2]), seed_pages[step : step + 2]
        quantize_slots(
            *(side.bfloat16().to(device) for side in sides),
            mapping.to(device),
            result.pages,
            layout,
            seed_pages=seeds.to(device),
        )
        reference_slots.quantize_slots(*sides, mapping, expected, layout, seed_pages=seeds, search=False)
    _assert_same(result, expected, layout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "head_dim"), [("tq4", 64), ("k3v2", 64), ("k8v4", 64), ("tq3", 80), ("k4v2", 96)]
)
def test_ordinary_tokens_take_the_nearest_levels(
    name: str, head_dim: int, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    """Of the best cell size, where there are several, against double precision.

    Indices err next to boundaries only, by one, and rarely; so do scales.
    """
    layout = layout_of(name, head_dim, 1, 32)
    slots = [*range(32, 64), *range(64, 74), *range(3, 9)]
    shape = (len(slots), 1, head_dim)
    common = 3 * torch.randn(1, head_dim, generator=generator)
    keys = (torch.randn(shape, generator=generator) + common).bfloat16()
    values = torch.randn(shape, generator=generator).bfloat16()
    pages = reference.quantize(
        torch.randn(96, 1, head_dim, generator=generator) + common, torch.zeros(96, 1, head_dim), layout
    )
    result = _launch(variant, keys, values, slots, pages, layout, device)
    result.assert_outside_is_untouched()
    found = result.pages.cpu()
    rotation = rotation_of(layout, CPU).double()
    rotated = [side.double()[:, 0] @ rotation.T for side in (keys, values)]
    centers = read_key_center(found, layout)
    assert centers is not None
    for page, run in ((1, slice(0, 32)), (2, slice(32, 42))):
        # half a unit of fp16, and of what float32 makes of a sum
        torch.testing.assert_close(
            centers[page, 0].double(), rotated[0][run].mean(dim=0), rtol=1.1 * 2.0**-11, atol=1e-5
        )
    assert torch.equal(centers[0], read_key_center(pages, layout)[0])  # type: ignore[index]
    left = rotated[0] - centers[torch.tensor(slots) // 32, 0].double()
    for side, vectors, whole in (("key", left, rotated[0]), ("value", rotated[1], rotated[1])):
        code = layout.spec.key if side == "key" else layout.spec.value
        levels, scales = read_side(found, layout, side)
        assert scales is not None
        chosen = torch.tensor(slots)
        _assert_nearest(
            vectors,
            whole,
            levels[chosen // 32, 0, chosen % 32].double(),
            scales[chosen // 32, 0, chosen % 32],
            code,
            search=variant == "pages",
            gain=VALUE_GAINS.get(code, 1.0) if variant == "pages" and side == "value" else 1.0,
        )


def _assert_nearest(
    vectors: torch.Tensor,
    whole: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    code: Code,
    *,
    search: bool,
    gain: float,
) -> None:
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = vectors * (TARGETS[code] * math.sqrt(vectors.shape[-1]) / norm)
    stretch = float((torch.linalg.vector_norm(whole, dim=-1, keepdim=True) / norm).max())
    allowed = boundary_distance(vectors.shape[-1], TARGETS[code], stretch)
    if code is Code.E4M3_SCALED:
        positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    else:
        positive = torch.tensor(LEVELS[code], dtype=torch.float64)
    sets, may_be_chosen = [list(midpoints(positive.tolist()))], torch.ones(1, len(unit), dtype=torch.bool)
    if search and code is not Code.E4M3_SCALED:
        sets, may_be_chosen = _sizes_to_choose(unit, code, allowed)
    found = torch.searchsorted(positive, levels.abs())
    fits, flips = [], []
    for boundaries in sets:
        edges = torch.tensor(boundaries, dtype=torch.float64)
        truth = torch.bucketize(unit.abs(), edges)
        differs = truth != found
        distance = (unit.abs() - edges[torch.minimum(truth, found).clamp_max(len(edges) - 1)]).abs()
        fits.append((((truth - found).abs() <= 1) & ((distance <= allowed) | ~differs)).all(dim=-1))
        flips.append(differs.sum(dim=-1))
    fit = torch.stack(fits) & may_be_chosen
    assert fit.any(dim=0).all(), "no cell size that is among the best gives these levels"
    fewest = torch.where(fit, torch.stack(flips), unit.shape[-1]).amin(dim=0)
    assert float(fewest.sum()) / unit.numel() <= QUANTIZE_FLIPS
    clear = unit.abs() > allowed
    assert torch.equal(levels[clear] < 0, unit[clear] < 0)
    true_scales = gain * norm[:, 0] / torch.linalg.vector_norm(levels, dim=-1)
    ulp = torch.exp2(torch.floor(torch.log2(true_scales)) - 10)
    assert ((scales.double() - true_scales).abs() <= SCALE_ULPS * ulp).all()


def _sizes_to_choose(
    unit: torch.Tensor, code: Code, allowed: float
) -> tuple[list[list[float]], torch.Tensor]:
    """Boundaries of each cell size, and which sizes ``[3, n]`` are the best, as the tables say.

    A coordinate within `allowed` of the next step may take that, which moves the sums by what the table does
    from step to step.
    """
    step = cells.RANGES[code] / (cells.NUM_STEPS - 1)
    sets = [[step * row.index(i) for i in range(1, len(LEVELS[code]))] for row in cells.magnitudes(code)]
    differences = torch.tensor(((0,) * cells.NUM_STEPS, *cells.differences(code)))
    size = (unit.abs() / step).clamp_max(cells.NUM_STEPS - 1)
    sums = differences[:, size.long()].sum(dim=-1)
    unsure = ((size - size.round()).abs() * step <= allowed).sum(dim=-1)
    moved = 2 * int(differences.diff(dim=1).abs().max()) * unsure
    return sets, sums <= sums.amin(dim=0) + moved


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tq4", "k3v2", "k8v4"])
def test_zeros_and_huge_numbers_stay_finite(
    name: str, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    keys = torch.zeros(16, 2, 64)
    keys[4:, :, 0] = 1e9
    result = _launch(
        variant,
        keys,
        keys.clone(),
        list(range(16)),
        torch.zeros(1, layout.page_bytes, dtype=torch.uint8),
        layout,
        device,
    )
    restored = reference.dequantize(result.pages.cpu(), layout)
    for side in restored:
        assert side.isfinite().all()
    assert not restored[1][:4].any()
    assert torch.linalg.vector_norm(restored[1][4:], dim=-1).min() > 65504


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_spoil_no_other_vector(
    number: float, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of("k3v4", heads=1)
    keys, values = torch.randn(2, 32, 1, 64, generator=generator)
    empty = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    sound = _launch(variant, keys, values, list(range(32)), empty, layout, device).pages.cpu()
    keys[3, 0, 5] = values[4, 0, 6] = number
    found = _launch(variant, keys, values, list(range(32)), empty, layout, device).pages.cpu()

    assert torch.equal(found[1], sound[1])
    for spoilt, clean in zip(
        read_side(found, layout, "value"), read_side(sound, layout, "value"), strict=True
    ):
        assert spoilt is not None
        assert clean is not None
        others = torch.arange(16) != 4
        assert torch.equal(spoilt[0, :, others], clean[0, :, others])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fp8", "raw"])
def test_unrotated_numbers_are_cast_as_pytorch_casts_them(
    name: str, variant: str, generator: torch.Generator, device: torch.device
) -> None:
    """Every bfloat16 that is a number, and float32 numbers between them."""
    layout = layout_of(name, 128, 4, 128)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = bits.where(bits.abs() >= 2.0**-126, 0.0).nan_to_num(0.0, 0.0, 0.0).view(128, 4, 128)
    between = numbers * 1.00390625
    slots = list(range(128))
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    result = _launch(variant, numbers, between, slots, pages, layout, device)

    assert torch.equal(result.pages.cpu(), reference.quantize(numbers, between, layout))


def test_slots_to_skip_and_no_tokens_change_nothing(device: torch.device) -> None:
    layout = layout_of("tq4")
    before = torch.full((2, layout.page_bytes), 0x5A, dtype=torch.uint8)
    result = guarded(before, device)
    for num_tokens in (0, 5, SMALLEST_PAGES_LAUNCH):
        tokens = torch.full((num_tokens, 2, 64), torch.nan, dtype=torch.bfloat16, device=device)
        skipped = torch.full((num_tokens,), -1, device=device)
        quantize_slots(tokens, tokens, skipped, result.pages, layout)
    assert torch.equal(result.pages.cpu(), before)
    result.assert_outside_is_untouched()


def test_offsets_beyond_two_to_the_31(generator: torch.Generator, device: torch.device) -> None:
    """Bytes of pages, and elements of keys."""
    layout = layout_of("tq4", heads=1)
    slots = [*range(16, 32), 3]
    exact = exact_tokens(layout, slots, 2, generator)
    num_pages = (1 << 31) // layout.page_bytes + 2
    pages = torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8, device=device)
    pages[-2:] = exact.pages.to(device)
    num_tokens, stride = 1 << 10, (1 << 21) + 128
    keys = torch.empty(num_tokens * stride, dtype=torch.bfloat16, device=device)
    keys = keys.view(num_tokens, 1, stride)[..., :64]
    values = torch.zeros(num_tokens, 1, 64, dtype=torch.bfloat16, device=device)
    keys[-len(slots) :], values[-len(slots) :] = exact.keys.to(keys), exact.values.to(values)
    mapping = torch.full((num_tokens,), -1, device=device)
    mapping[-len(slots) :] = torch.tensor(slots) + (num_pages - 2) * 16
    assert plan_quantize(num_tokens, page_shape(layout)).variant == "pages"
    quantize_slots(keys, values, mapping, pages, layout)

    assert torch.equal(pages[-2:].cpu(), _reference(exact, slots, layout))


def test_plans_depend_on_the_number_of_tokens_and_the_shape_alone() -> None:
    shape = page_shape(layout_of("tq4", 128, 8, 64))
    few, many = plan_quantize(512, shape), plan_quantize(513, shape)

    assert (few.variant, few.programs, few.window, few.windows, few.rows) == ("append", 512, 1, 1, 16)
    assert (many.variant, many.rows, many.num_warps, many.max_registers) == ("pages", 64, 4, 128)
    for num_tokens in (513, 4096, 32768, 32769):
        plan = plan_quantize(num_tokens, shape)
        looked_at = plan.window * plan.windows
        assert (plan.programs - 1) * looked_at < num_tokens <= plan.programs * looked_at
    assert plan_quantize(4096, page_shape(layout_of("tq4", 128, 8, 128))).num_warps == 8
    assert plan_quantize(4096, page_shape(layout_of("tq4", 64, 8, 16))).window == 16
    wide = page_shape(layout_of("tq4", 256, 8, 128))
    assert [plan_quantize(4096, wide, wide=is_wide).rows for is_wide in (False, True)] == [128, 16]


def _launched_plan(
    layout: PageLayout, dtype: torch.dtype, device: torch.device, patch: pytest.MonkeyPatch, *, balanced: bool
) -> LaunchPlan:
    """The plan with which many tokens to skip are launched, on Hopper as elsewhere."""
    plans: list[LaunchPlan] = []
    patch.setattr(quantize, "takes_kernel", lambda _: True)
    patch.setattr(quantize, "hopper_packs", lambda *_: False)
    patch.setattr(_launch_quantize, "launch_quantize", lambda plan, *_, **__: plans.append(plan))
    shape = (layout.num_kv_heads, layout.head_dim)
    tokens = torch.zeros(SMALLEST_PAGES_LAUNCH, *shape, dtype=dtype, device=device)
    slots = torch.full((SMALLEST_PAGES_LAUNCH,), -1, device=device)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
    balance = torch.ones(shape, device=device) if balanced else None
    quantize_slots(tokens, tokens, slots, pages, layout, key_balance=balance)
    return plans[0]


@pytest.mark.parametrize(
    ("dtype", "balanced", "wide"),
    [
        (torch.bfloat16, False, False),
        (torch.float16, False, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
    ],
)
def test_float32_rows_are_launched_with_the_plan_of_wide_rows(
    dtype: torch.dtype, balanced: bool, wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head_dim, rows in ((128, 64), (256, 16 if wide else 64)):
        layout = layout_of("tq4", head_dim, 1, 64)
        plan = _launched_plan(layout, dtype, device, monkeypatch, balanced=balanced)

        assert plan == plan_quantize(SMALLEST_PAGES_LAUNCH, page_shape(layout), wide=wide)
        assert plan.rows == rows
        assert plan.max_registers == (None if wide or head_dim == 256 else 128)


@pytest.mark.parametrize("balanced", [False, True])
def test_wide_rows_of_a_broad_page_give_the_bytes_of_the_reference(
    balanced: bool, generator: torch.Generator, device: torch.device
) -> None:
    """Pages of several tiles, each of which is rotated for the centre and again to be written."""
    layout = layout_of("tq4", 256, 1, 64)
    slots = [*range(64), *range(100, 103), *range(128, 150)]
    exact = exact_tokens(layout, slots, 3, generator)
    balance = torch.exp2(torch.randint(-3, 4, (1, 256), generator=generator).float()) if balanced else None
    keys = exact.keys if balance is None else exact.keys * balance
    shape = page_shape(layout)
    assert plan_quantize(SMALLEST_PAGES_LAUNCH, shape, wide=True).rows < layout.page_tokens
    result = _launch("pages", keys, exact.values, slots, exact.pages, layout, device, key_balance=balance)
    _assert_same(result, _reference(exact, slots, layout), layout)


@pytest.mark.parametrize("ptx", [False, True])
def test_only_nvidia_is_given_a_limit_on_registers(
    ptx: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return options.update

    monkeypatch.setattr(quantize, "takes_kernel", lambda _: True)
    monkeypatch.setattr(_launch_quantize, "has_nvidia_assembly", lambda _: ptx)
    monkeypatch.setattr(_launch_quantize, "quantize_runs", Kernel())
    layout = layout_of("tq4")
    tokens = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=device)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
    quantize_slots(tokens, tokens, torch.zeros(1, dtype=torch.int64, device=device), pages, layout)

    assert options["MODE"].ptx == ptx
    assert options.get("maxnreg", "not given") == (128 if ptx else "not given")


def test_a_cpu_without_the_interpreter_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    layout = layout_of("tq4")
    slots = _mixed_slots(16)
    exact = exact_tokens(layout, slots, 10, generator)
    calls = []
    monkeypatch.setattr(_launch_quantize, "launch_quantize", lambda *arguments, **_: calls.append(arguments))
    result = guarded(exact.pages, CPU)
    quantize_slots(exact.keys, exact.values, torch.tensor(slots), result.pages, layout)

    assert not calls
    _assert_same(result, _reference(exact, slots, layout, search=False), layout)


@pytest.mark.parametrize(
    ("name", "head_dim", "page_tokens", "dtype"),
    [
        *((name, 64, 16, torch.bfloat16) for name, spec in PRESETS.items() if spec.key.rotated),
        *((name, 128, 64, torch.bfloat16) for name, spec in PRESETS.items() if spec.key.rotated),
        ("tq4", 128, 128, torch.float16),
        ("tq3", 256, 64, torch.bfloat16),
        ("k3v2", 64, 64, torch.float32),
    ],
)
def test_tokens_that_share_no_page_are_written_as_the_plan_says(
    name: str,
    head_dim: int,
    page_tokens: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """First tokens with a seed and without, tokens of every group and lane, one to skip; sinks besides."""
    layout = layout_of(name, head_dim, page_tokens=page_tokens)
    p = page_tokens
    offsets = (0, 0, 1, 6, p // 4 + 2, p // 2 + 3, 3 * p // 4 + 1, p - 1)
    slots = [page * p + offset for page, offset in enumerate(offsets)]
    slots.insert(3, -1)
    seed_pages = [8, *[-1] * 8]
    exact = exact_tokens(layout, slots, 10, generator, {0: 8})
    result = guarded(exact.pages, device)
    sink_slots = torch.tensor([-1, 2, -1, 5, *[-1] * 5], dtype=torch.int32, device=device)
    sinks = torch.zeros(2, 6, 2, head_dim, dtype=dtype, device=device)
    keys, values = exact.keys.to(dtype).to(device), exact.values.to(dtype).to(device)
    quantize_slots(
        keys,
        values,
        torch.tensor(slots, device=device),
        result.pages,
        layout,
        one_per_page=True,
        seed_pages=torch.tensor(seed_pages, dtype=torch.int32, device=device),
        key_balance=torch.ones(2, head_dim, device=device),
        sink_slots=sink_slots,
        sink_keys=sinks[0],
        sink_values=sinks[1],
    )
    hopper = hopper_appends(device, layout)
    search = plan_quantize(9, page_shape(layout), hopper=hopper).search
    _assert_same(result, _reference(exact, slots, layout, seed_pages, search=search), layout)
    for side, kept in zip((keys, values), sinks, strict=True):
        assert torch.equal(kept[[2, 5]], side[[1, 3]])
        assert not kept[[0, 1, 3, 4]].any()


def _sinks(num_tokens: int) -> dict[str, Any]:
    return {
        "sink_slots": torch.full((num_tokens,), -1, dtype=torch.int32),
        "sink_keys": torch.zeros(8, 2, 64),
        "sink_values": torch.zeros(8, 2, 64),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(4, 3, 64)}, r"keys must be \[4, 2, 64\] bfloat16 or float16 or float32"),
        ({"keys": torch.zeros(4, 2, 64).double()}, r"keys must be .* not \[4, 2, 64\] torch.float64"),
        ({"values": torch.zeros(4, 2, 64).half()}, r"values must be \[4, 2, 64\] float32"),
        ({"values": torch.zeros(4, 64, 2).mT}, r"the last 1 dimension\(s\) of values must be contiguous"),
        ({"slot_mapping": torch.zeros(5, dtype=torch.int64)}, r"slot_mapping must be \[4\] int64 or int32"),
        ({"seed_pages": torch.zeros(4, dtype=torch.int64)}, r"seed_pages must be \[4\] int32"),
        ({"key_balance": torch.zeros(2, 32)}, r"key_balance must be \[2, 64\] float32"),
        ({"sink_slots": torch.zeros(4, dtype=torch.int32)}, "sink_values come together"),
        (_sinks(3), r"sink_slots must be \[4\] int32"),
        (_sinks(4) | {"sink_keys": torch.zeros(8, 1, 64)}, r"sink_keys must be \[any, 2, 64\]"),
        (
            _sinks(4) | {"sink_values": torch.zeros(8, 2, 64).half()},
            r"sink_values must be \[8, 2, 64\] float32",
        ),
        (_sinks(4) | {"sink_values": torch.zeros(2, 8, 64).transpose(0, 1)}, "equal strides"),
        ({"pages": torch.zeros(1, 64, dtype=torch.uint8)}, r"pages must be \[num_pages, \d+\] uint8"),
        (
            {"keys": torch.empty_strided((4, 2, 64), (1 << 27, 64, 1))},
            "keys has a stride of 134217728, too large for 32-bit offsets in a page",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    layout = layout_of("tq4")
    arguments: dict[str, Any] = {
        "keys": torch.zeros(4, 2, 64),
        "values": torch.zeros(4, 2, 64),
        "slot_mapping": torch.zeros(4, dtype=torch.int64),
        "pages": torch.zeros(1, layout.page_bytes, dtype=torch.uint8),
        "layout": layout,
    } | change
    with pytest.raises(ValueError, match=message):
        quantize_slots(**arguments)


@pytest.mark.parametrize(
    ("name", "head_dim", "page_tokens", "message"),
    [
        ("tq4", 64, 48, "kernels need page_tokens to be a power of two, not 48"),
        ("tq4", 64, 256, "kernels need page_tokens to be at most 128, not 256"),
        ("raw", 272, 16, "kernels need head_dim to be at most 256, not 272"),
    ],
)
def test_sizes_that_kernels_do_not_serve_are_refused(
    name: str, head_dim: int, page_tokens: int, message: str
) -> None:
    layout = layout_of(name, head_dim, 2, page_tokens)
    tokens = torch.zeros(1, 2, head_dim)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        quantize_slots(tokens, tokens, torch.zeros(1, dtype=torch.int64), pages, layout)
