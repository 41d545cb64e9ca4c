"""The dequantize kernel puts every token where it belongs, as the reference reads it, and nothing else."""

from typing import Any

import pytest
import torch

from tq_kernels import PRESETS, CodecSpec, PageLayout, _launch_dequantize, reference, reference_slots
from tq_kernels._page_shape import page_shape
from tq_kernels.dequantize import dequantize_pages
from tq_kernels.dequantize_plan import plan_dequantize
from tq_kernels.reference import plane_view
from tq_kernels.spec import Code

from .slot_cases import CPU, guarded, layout_of
from .tolerances import UNIT_ROUNDOFF, half_product_error, rotation_error

CACHE_TOKENS = 24
CANARY = 7.0
"""Fills what lies before, after and between the rows of a cache."""


def _pages(layout: PageLayout, num_pages: int, generator: torch.Generator) -> torch.Tensor:
    """Pages of every index, with scales and centres that are ordinary numbers."""
    pages = torch.randint(256, (num_pages, layout.page_bytes), dtype=torch.uint8, generator=generator)
    for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
        if code.rotated:
            scales = plane_view(pages, layout, f"{side}_scales")
            scales.copy_((torch.rand(scales.shape, generator=generator) + 0.01).half().view(torch.int16))
        words = plane_view(pages, layout, f"{side}_words")
        if code in (Code.E4M3, Code.E4M3_SCALED):
            # 7F and FF are no numbers
            words.view(torch.uint8).masked_fill_(words.view(torch.uint8) & 0x7F == 0x7F, 0x7E)
        elif code is Code.BF16:
            numbers = torch.randn((*words.shape[:-1], 2 * words.shape[-1]), generator=generator).bfloat16()
            words.copy_(numbers.view(torch.int32))
    if layout.plane("key_center"):
        center = plane_view(pages, layout, "key_center")
        center.copy_((3 * torch.randn(center.shape, generator=generator)).half().view(torch.int16))
    return pages


class GuardedCache:
    """A cache of rows of NaN whose strides are its own, with canaries all around them."""

    def __init__(self, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, head_dim = layout.num_kv_heads, layout.head_dim
        shape = (num_pages + 2, heads + 1, CACHE_TOKENS, head_dim + 16)
        self.buffer = torch.full(shape, CANARY, dtype=dtype, device=device)
        self.rows = self.buffer[1:-1, :heads, :, :head_dim].transpose(1, 2)
        self.rows.fill_(torch.nan)

    def assert_outside_is_untouched(self) -> None:
        self.rows.fill_(CANARY)
        assert (self.buffer == CANARY).all()


def _check(
    layout: PageLayout,
    device: torch.device,
    generator: torch.Generator,
    *,
    variant: str,
    rotated: bool,
    dtype: torch.dtype,
    key_balance: torch.Tensor | None = None,
) -> None:
    pages = _pages(layout, 4, generator)
    indices = torch.tensor([3, 1, 3], dtype=torch.int32)
    count = len(indices) * layout.page_tokens
    cache_pages = count // CACHE_TOKENS + 2
    slots = torch.randperm(cache_pages * CACHE_TOKENS, generator=generator)[:count]
    slots[[0, count - 1]] = -1
    caches = [GuardedCache(layout, cache_pages, dtype, device) for _ in range(2)]
    held = guarded(pages, device)
    assert plan_dequantize(len(indices), page_shape(layout), rotated=rotated).variant == variant
    dequantize_pages(
        held.pages,
        indices.to(device),
        caches[0].rows,
        caches[1].rows,
        slots.to(device),
        layout,
        key_balance=None if key_balance is None else key_balance.to(device),
        rotated=rotated,
    )
    truth = [torch.full(tuple(cache.rows.shape), torch.nan, dtype=torch.float64) for cache in caches]
    exact = [torch.full(tuple(cache.rows.shape), torch.nan, dtype=dtype) for cache in caches]
    reference_slots.dequantize_pages(
        pages, indices, *truth, slots, layout, key_balance=key_balance, rotated=rotated
    )
    reference_slots.dequantize_pages(
        pages, indices, *exact, slots, layout, key_balance=key_balance, rotated=rotated
    )
    for cache, wide, rounded, code in zip(
        caches, truth, exact, (layout.spec.key, layout.spec.value), strict=True
    ):
        found = cache.rows.cpu()
        if rotated or not code.rotated:
            torch.testing.assert_close(found, rounded, rtol=0, atol=0, equal_nan=True)
        else:
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            is_key = cache is caches[0]
            widest = 4.0 if is_key and key_balance is not None else 1.0
            error = 2 * rotation_error(layout.head_dim) + half_product_error(dtype if is_key else None)
            allowed = widest * error * length
            allowed = allowed + UNIT_ROUNDOFF[dtype] * (wide.abs() + allowed)
            assert torch.equal(found.isnan(), wide.isnan())
            assert ((found.double() - wide).abs() <= allowed)[~wide.isnan()].all()
        cache.assert_outside_is_untouched()
    assert torch.equal(held.pages.cpu(), pages)
    held.assert_outside_is_untouched()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_rotated_tokens_are_the_reference_to_the_last_bit(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    _check(layout, device, generator, variant="copy", rotated=True, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_tokens_rotated_back_are_the_reference_but_for_rounding(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    variant = "product" if layout.spec.key.rotated else "copy"
    _check(layout, device, generator, variant=variant, rotated=False, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "page_tokens"),
    [
        ("tq4", 80, 3, 32),
        ("tq3", 96, 1, 16),
        ("k4v2", 128, 1, 64),
        ("tq2", 256, 1, 16),
        ("k8v4", 64, 1, 128),
        ("tq2", 64, 1, 128),
        ("tq3", 80, 1, 128),
        ("fp8", 80, 1, 32),
        ("raw", 96, 3, 16),
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_pages_of_other_sizes(
    name: str,
    head_dim: int,
    heads: int,
    page_tokens: int,
    rotated: bool,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    layout = layout_of(name, head_dim, heads, page_tokens)
    variant = "product" if layout.spec.key.rotated and not rotated else "copy"
    _check(layout, device, generator, variant=variant, rotated=rotated, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("key", "value"),
    [(Code.BF16, Code.LM4), (Code.E4M3, Code.LM3), (Code.LM2, Code.E4M3_SCALED), (Code.LM3, Code.BF16)],
)
def test_any_two_codes(key: Code, value: Code, generator: torch.Generator, device: torch.device) -> None:
    layout = PageLayout(spec=CodecSpec(key=key, value=value), head_dim=64, num_kv_heads=1, page_tokens=16)
    _check(layout, device, generator, variant="product", rotated=False, dtype=torch.bfloat16)
    _check(layout, device, generator, variant="copy", rotated=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["tq4", "k8v4", "fp8", "raw"])
@pytest.mark.parametrize("rotated", [False, True])
def test_keys_rotated_back_are_multiplied_by_their_balance(
    name: str, rotated: bool, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name)
    variant = "product" if layout.spec.key.rotated and not rotated else "copy"
    balance = torch.rand(2, 64, generator=generator) * 3.5 + 0.5
    _check(
        layout, device, generator, variant=variant, rotated=rotated, dtype=torch.float32, key_balance=balance
    )


@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2", "k8v4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_of_any_size_are_finite(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """Beyond what float16 allows too; and as exact as their bytes where caches are."""
    layout, slots = layout_of(name, heads=1), torch.arange(16, device=device)
    for size in (1e-3, 6e4, 1e6, 1e30):
        keys = size * torch.randn(16, 1, 64, generator=generator).sign()
        pages = reference.quantize(keys, keys, layout)
        wanted, _ = reference.dequantize(pages, layout)
        caches = [torch.full((1, 16, 1, 64), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        index = torch.zeros(1, dtype=torch.int32, device=device)
        dequantize_pages(pages.to(device), index, *caches, slots, layout)
        found = caches[0][0].cpu().double()
        assert found.isfinite().all()
        if size < 1e6:
            length = torch.linalg.vector_norm(wanted, dim=-1, keepdim=True).double()
            error = 2 * rotation_error(64) + half_product_error(dtype)
            allowed = error * length + UNIT_ROUNDOFF[dtype] * (wanted.double().abs() + error * length)
            assert ((found - wanted.double()).abs() <= allowed).all()


@pytest.mark.parametrize("num_pages", [1, 4, 5])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_quantized_comes_back(
    num_pages: int, rotated: bool, generator: torch.Generator, device: torch.device
) -> None:
    """Into a cache of one page, of any size, which attention over an inflated prefix reads."""
    layout = layout_of("tq4", heads=1)
    tokens = num_pages * 16
    keys, values = (torch.randn(tokens, 1, 64, generator=generator) for _ in range(2))
    pages = reference.quantize(keys, values, layout).to(device)
    caches = [torch.full((1, tokens + 3, 1, 64), torch.nan, device=device) for _ in range(2)]
    slots = torch.arange(tokens, device=device)
    indices = torch.arange(num_pages, dtype=torch.int32, device=device)
    dequantize_pages(pages, indices, *caches, slots, layout, rotated=rotated)
    rotation = reference.rotation_of(layout, CPU)
    for cache, plain in zip(caches, (keys, values), strict=True):
        restored = cache[0, :tokens].cpu()
        restored = restored @ rotation if rotated else restored
        error = torch.linalg.vector_norm(restored - plain) / torch.linalg.vector_norm(plain)
        assert error < 0.11
        assert cache[0, tokens:].isnan().all()


@pytest.mark.parametrize("rotated", [False, True])
def test_offsets_beyond_two_to_the_31(
    rotated: bool, generator: torch.Generator, device: torch.device
) -> None:
    """Bytes of pages, and elements of caches."""
    layout = layout_of("tq4", heads=1)
    few = _pages(layout, 2, generator)
    num_pages = (1 << 31) // layout.page_bytes + 2
    pages = torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8, device=device)
    pages[-2:] = few.to(device)
    cache_pages = (1 << 31) // (CACHE_TOKENS * 64) + 3
    caches = [
        torch.empty(cache_pages, CACHE_TOKENS, 1, 64, dtype=torch.bfloat16, device=device) for _ in range(2)
    ]
    slots = torch.arange(32) + (cache_pages - 2) * CACHE_TOKENS
    indices = torch.tensor([num_pages - 1, num_pages - 2], dtype=torch.int32)
    dequantize_pages(pages, indices.to(device), *caches, slots.to(device), layout, rotated=rotated)
    expected = [torch.empty(2, CACHE_TOKENS, 1, 64) for _ in range(2)]
    reference_slots.dequantize_pages(
        few, torch.tensor([1, 0]), *expected, torch.arange(32), layout, rotated=rotated
    )
    for cache, truth in zip(caches, expected, strict=True):
        found, wanted = cache[-2:].flatten(0, 1)[:32].cpu().float(), truth.flatten(0, 1)[:32]
        length = float(torch.linalg.vector_norm(wanted, dim=-1).max())
        torch.testing.assert_close(
            found, wanted, rtol=2.0**-7, atol=half_product_error(torch.bfloat16) * length
        )


def test_no_pages_change_nothing(device: torch.device) -> None:
    layout = layout_of("tq4")
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
    caches = [GuardedCache(layout, 1, torch.bfloat16, device) for _ in range(2)]
    indices = torch.zeros(0, dtype=torch.int32, device=device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    dequantize_pages(pages, indices, caches[0].rows, caches[1].rows, slots, layout)
    for cache in caches:
        assert cache.rows.isnan().all()
        cache.assert_outside_is_untouched()


def test_plans_depend_on_the_number_of_pages_and_the_shape_alone() -> None:
    shape = page_shape(layout_of("tq4", 128, 8, 64))
    copy, product = (plan_dequantize(9, shape, rotated=rotated) for rotated in (True, False))

    assert (copy.variant, copy.programs, copy.pages) == ("copy", 9, 1)
    assert (product.variant, product.programs, product.pages) == ("product", 3, 4)
    assert plan_dequantize(9, page_shape(layout_of("fp8", 128)), rotated=False).variant == "copy"
    large = page_shape(layout_of("tq4", 128, 8, 128))
    assert plan_dequantize(9, large, rotated=True).num_warps == 8
    assert (product.rows, product.num_warps) == (64, 4)
    assert plan_dequantize(9, large, rotated=False) == product
    assert plan_dequantize(9, page_shape(layout_of("tq4", 256, 8, 128)), rotated=False).num_warps == 8


def test_a_cpu_without_the_interpreter_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    calls = []
    monkeypatch.setattr(
        _launch_dequantize, "launch_dequantize", lambda *arguments, **_: calls.append(arguments)
    )
    _check(layout_of("tq4"), CPU, generator, variant="copy", rotated=True, dtype=torch.bfloat16)

    assert not calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_indices": torch.zeros(1, dtype=torch.int64)}, r"page_indices must be \[any\] int32"),
        (
            {"key_cache": torch.zeros(1, 16, 3, 64)},
            r"key_cache must be \[any, any, 2, 64\] bfloat16 or float16 or float32",
        ),
        ({"value_cache": torch.zeros(1, 17, 2, 64)}, r"value_cache must be \[1, 16, 2, 64\] float32"),
        ({"value_cache": torch.zeros(1, 16, 2, 64).half()}, r"value_cache must be \[1, 16, 2, 64\] float32"),
        ({"value_cache": torch.zeros(1, 16, 64, 2).mT}, "of value_cache must be contiguous"),
        ({"slot_mapping": torch.zeros(15, dtype=torch.int64)}, r"slot_mapping must be \[16\] int64"),
        ({"key_balance": torch.zeros(2, 32)}, r"key_balance must be \[2, 64\] float32"),
        ({"pages": torch.zeros(1, 64, dtype=torch.uint8)}, r"pages must be \[num_pages, \d+\] uint8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    layout = layout_of("tq4")
    arguments: dict[str, Any] = {
        "pages": torch.zeros(1, layout.page_bytes, dtype=torch.uint8),
        "page_indices": torch.zeros(1, dtype=torch.int32),
        "key_cache": torch.zeros(1, 16, 2, 64),
        "value_cache": torch.zeros(1, 16, 2, 64),
        "slot_mapping": torch.zeros(16, dtype=torch.int64),
        "layout": layout,
    } | change
    with pytest.raises(ValueError, match=message):
        dequantize_pages(**arguments)
