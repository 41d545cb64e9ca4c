"""The reference for slots: whole pages are those of `reference.py`, and no token touches another's bits."""

import pytest
import torch

from tq_kernels import PRESETS, KeyCenter, PageLayout, reference
from tq_kernels.packing import unpack
from tq_kernels.reference import plane_view, read_key_center
from tq_kernels.reference_slots import dequantize_pages, quantize_slots

from .slot_cases import layout_of

ROTATED = [name for name, spec in PRESETS.items() if spec.key.rotated]


def _tokens(
    layout: PageLayout, num_tokens: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (num_tokens, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator) + 1, torch.randn(shape, generator=generator)


def _random_pages(layout: PageLayout, num_pages: int, generator: torch.Generator) -> torch.Tensor:
    pages = torch.randint(256, (num_pages, layout.page_bytes), dtype=torch.uint8, generator=generator)
    if layout.spec.key_center is not KeyCenter.NONE:
        center = torch.randn(plane_view(pages, layout, "key_center").shape, generator=generator)
        plane_view(pages, layout, "key_center").copy_(center.half().view(torch.int16))
    return pages


def _token_bits(page: torch.Tensor, layout: PageLayout) -> list[torch.Tensor]:
    """Everything that belongs to tokens, one row a token."""
    bits = []
    for side, code in (("key", layout.spec.key), ("value", layout.spec.value)):
        words, signs = plane_view(page, layout, f"{side}_words"), None
        if layout.plane(f"{side}_signs"):
            signs = plane_view(page, layout, f"{side}_signs")
        if side == "value":
            words, signs = words.transpose(-1, -2), None if signs is None else signs.transpose(-1, -2)
        indices = unpack(words, signs, code)[0]
        bits.append((indices if side == "key" else indices.transpose(-1, -2)).transpose(0, 1).flatten(1))
        if code.rotated:
            bits.append(plane_view(page, layout, f"{side}_scales")[0, :, 0].transpose(0, 1))
    return bits


@pytest.mark.parametrize("name", PRESETS)
def test_whole_pages_at_once_are_those_of_quantize(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name, page_tokens=32)
    keys, values = _tokens(layout, 96, generator)
    pages = _random_pages(layout, 5, generator)
    untouched = pages[[0, 3]].clone()
    slots = torch.cat([torch.arange(32) + 32 * page for page in (4, 1, 2)])
    quantize_slots(keys, values, slots, pages, layout)

    assert torch.equal(pages[[4, 1, 2]], reference.quantize(keys, values, layout))
    assert torch.equal(pages[[0, 3]], untouched)


@pytest.mark.parametrize("name", PRESETS)
def test_the_order_of_tokens_does_not_matter(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name)
    keys, values = (side.round() for side in _tokens(layout, 32, generator))
    order = torch.randperm(32, generator=generator)
    pages = [torch.zeros(2, layout.page_bytes, dtype=torch.uint8) for _ in range(2)]
    quantize_slots(keys, values, torch.arange(32), pages[0], layout)
    quantize_slots(keys[order], values[order], order, pages[1], layout)

    assert torch.equal(*pages)


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_one_by_one_touch_their_own_bits_only(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name)
    keys, values = _tokens(layout, 15, generator)
    pages = _random_pages(layout, 2, generator)
    at_once = pages.clone()
    before = [bits.clone() for bits in _token_bits(pages[1:], layout)]
    center = read_key_center(pages, layout)
    for token in (14, 3, 7):
        slot = torch.tensor([16 + token + 1])
        quantize_slots(keys[token : token + 1], values[token : token + 1], slot, pages, layout)
    chosen = [3, 7, 14]
    slots = torch.tensor(chosen) + 17
    quantize_slots(keys[chosen], values[chosen], slots, at_once, layout)
    others = torch.ones(16, dtype=torch.bool)
    others[slots - 16] = False

    assert torch.equal(pages, at_once)
    for now, then in zip(_token_bits(pages[1:], layout), before, strict=True):
        assert torch.equal(now[others], then[others])
    if center is not None:
        assert torch.equal(read_key_center(pages, layout), center)


def test_slots_to_skip_and_no_tokens_change_nothing(generator: torch.Generator) -> None:
    layout = layout_of("tq4")
    pages = _random_pages(layout, 2, generator)
    before = pages.clone()
    quantize_slots(*_tokens(layout, 3, generator), torch.full((3,), -1), pages, layout)
    quantize_slots(*_tokens(layout, 0, generator), torch.zeros(0, dtype=torch.int64), pages, layout)

    assert torch.equal(pages, before)


@pytest.mark.parametrize("name", ROTATED)
def test_a_seed_gives_its_centre_to_a_page_that_is_not_filled(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name)
    keys, values = _tokens(layout, 16, generator)
    pages = _random_pages(layout, 3, generator)
    seeds = torch.full((16,), -1, dtype=torch.int32)
    seeds[0] = 2
    centers = read_key_center(pages, layout)
    assert centers is not None
    partial, full, mean = pages.clone(), pages.clone(), pages.clone()
    quantize_slots(keys[:15], values[:15], torch.arange(15), partial, layout, seed_pages=seeds[:15])
    quantize_slots(keys, values, torch.arange(16), full, layout, seed_pages=seeds)
    quantize_slots(keys[1:], values[1:], torch.arange(15), mean, layout, seed_pages=seeds[1:])

    assert torch.equal(read_key_center(partial, layout)[0], centers[2])
    assert torch.equal(full[:1], reference.quantize(keys, values, layout))
    rotated = keys[1:] @ reference.rotation_of(layout, torch.device("cpu")).T
    torch.testing.assert_close(read_key_center(mean, layout)[0], rotated.mean(dim=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ROTATED)
def test_padding_becomes_zero_with_the_first_token_of_a_page(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name)
    used = layout.planes[-1].offset + layout.planes[-1].num_bytes
    assert used < layout.section_bytes
    pages = torch.full((1, layout.page_bytes), 0xA5, dtype=torch.uint8)
    padding = pages.view(layout.num_kv_heads, -1)[:, used:]
    quantize_slots(*_tokens(layout, 1, generator), torch.tensor([5]), pages, layout)
    assert (padding == 0xA5).all()
    quantize_slots(*_tokens(layout, 1, generator), torch.tensor([0]), pages, layout)
    assert not padding.any()


@pytest.mark.parametrize("name", PRESETS)
def test_a_balance_is_taken_out_of_keys_and_put_back(name: str, generator: torch.Generator) -> None:
    layout = layout_of(name)
    keys, values = _tokens(layout, 16, generator)
    balance = torch.rand(2, 64, generator=generator) + 0.5
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    quantize_slots(keys, values, torch.arange(16), pages, layout, key_balance=balance)
    assert torch.equal(pages, reference.quantize(keys, values, layout, key_balance=balance))
    assert torch.equal(pages, reference.quantize(keys / balance, values, layout))

    plain, _ = reference.dequantize(pages, layout)
    restored, _ = reference.dequantize(pages, layout, key_balance=balance)
    assert torch.equal(restored, plain * balance)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("rotated", [False, True])
def test_dequantized_tokens_stand_in_their_slots(
    name: str, rotated: bool, generator: torch.Generator
) -> None:
    layout = layout_of(name)
    keys, values = _tokens(layout, 48, generator)
    balance = torch.rand(2, 64, generator=generator) + 0.5
    pages = reference.quantize(keys, values, layout, key_balance=balance)
    slots = torch.randperm(36, generator=generator)[:32]
    slots[5] = -1
    caches = [torch.full((3, 12, 2, 64), torch.nan) for _ in range(2)]
    indices = torch.tensor([2, 0], dtype=torch.int32)
    dequantize_pages(pages, indices, *caches, slots, layout, key_balance=balance, rotated=rotated)
    expected = reference.dequantize(pages[[2, 0]], layout, key_balance=balance)
    for cache, truth, code in zip(caches, expected, (layout.spec.key, layout.spec.value), strict=True):
        rows, written = cache.flatten(0, 1), slots[slots >= 0]
        unwritten = torch.ones(36, dtype=torch.bool)
        unwritten[written] = False
        assert rows[unwritten].isnan().all()
        found = rows[written]
        if rotated and code.rotated:
            found = found @ reference.rotation_of(layout, torch.device("cpu"))
        if rotated and cache is caches[0]:
            found = found * balance
        torch.testing.assert_close(found, truth[slots >= 0], rtol=1e-5, atol=1e-5)
