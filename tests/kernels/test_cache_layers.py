"""All layers in one launch are what one launch a layer makes, wherever the layers lie."""

import pytest
import torch

from tq_kernels import PageLayout, reference_slots
from tq_kernels.cache_layers import CacheLayers, cache_layers, dequantize_layers, quantize_layers

from .slot_cases import GuardedPages, exact_tokens, guarded, layout_of

LAYERS, CELL_PAGES, NUM_CELLS, CACHE_TOKENS = 3, 2, 2, 8
CELL = LAYERS * CELL_PAGES
NAMES = ["tq4", "k3v2", "raw"]


def _by_layer(pages: torch.Tensor) -> torch.Tensor:
    """Pages of cells, in each of which every layer has its own one after the other, by layer."""
    row = pages.stride(0)
    size = (LAYERS, len(pages) - (LAYERS - 1) * CELL_PAGES, pages.shape[1])
    return pages.as_strided(size, (CELL_PAGES * row, row, 1), pages.storage_offset())


def _slots(page_tokens: int) -> list[int]:
    """Slots of a whole chunk, of one whose second page is begun, and one left out."""
    p = page_tokens
    return [*range(2 * p), -1, *range(CELL * p, (CELL + 1) * p), *range((CELL + 1) * p, (CELL + 1) * p + 3)]


def _caches(
    layout: PageLayout, num_pages: int, device: torch.device, dtype: torch.dtype
) -> tuple[CacheLayers, list[torch.Tensor]]:
    """Caches whose heads lie outside of their tokens, one allocation a layer, of -7; and the memory.

    Some layers lie before the first, some behind it.
    """
    shape = (num_pages, layout.num_kv_heads, CACHE_TOKENS, 2 * layout.head_dim)
    memory = [torch.full(shape, -7.0, dtype=dtype, device=device) for _ in range(LAYERS)]
    memory.sort(key=torch.Tensor.data_ptr)
    memory = [*memory[1:], memory[0]]
    sides = [side.transpose(1, 2).split(layout.head_dim, dim=-1) for side in memory]
    return cache_layers([keys for keys, _ in sides], [values for _, values in sides]), memory


def _balance(layout: PageLayout, is_balanced: bool) -> torch.Tensor | None:
    if not is_balanced:
        return None
    numbers = torch.tensor([1.0, 2.0, 0.5]).repeat_interleave(layout.num_kv_heads * layout.head_dim)
    return numbers.view(LAYERS, layout.num_kv_heads, layout.head_dim)


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_all_layers_are_packed_as_those_of_each(
    name: str, is_balanced: bool, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name, heads=1)
    slots = _slots(layout.page_tokens)
    exact = [exact_tokens(layout, slots, NUM_CELLS * CELL, generator) for _ in range(LAYERS)]
    balance = _balance(layout, is_balanced)
    cache, _ = _caches(layout, -(-len(slots) // CACHE_TOKENS) + 3, device, torch.bfloat16)
    places = torch.randperm(len(cache.keys[0]) * CACHE_TOKENS, generator=generator)[: len(slots)]
    for number, each in enumerate(exact):
        keys = each.keys if balance is None else each.keys * balance[number]
        for side, tokens in ((cache.keys, keys), (cache.values, each.values)):
            side[number][places // CACHE_TOKENS, places % CACHE_TOKENS] = tokens.bfloat16().to(device)
    result: GuardedPages = guarded(exact[0].pages, device)
    quantize_layers(
        cache,
        places.to(device),
        torch.tensor(slots, device=device),
        _by_layer(result.pages),
        layout,
        key_balance=None if balance is None else balance.to(device),
    )

    expected = exact[0].pages.clone()
    for number, pages in enumerate(_by_layer(expected)):
        given = (exact[number].keys, exact[number].values, torch.tensor(slots))
        reference_slots.quantize_slots(*given, pages, layout)
    assert torch.equal(result.pages.cpu(), expected)
    result.assert_outside_is_untouched()


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pages_of_all_layers_are_unpacked_as_those_of_each(
    name: str, is_balanced: bool, generator: torch.Generator, device: torch.device
) -> None:
    layout = layout_of(name, heads=1)
    slots = _slots(layout.page_tokens)
    exact = exact_tokens(layout, slots, NUM_CELLS * CELL, generator)
    pages = exact.pages.clone()
    for each in _by_layer(pages):
        reference_slots.quantize_slots(exact.keys, exact.values, torch.tensor(slots), each, layout)
    indices = torch.tensor([0, 1, CELL], dtype=torch.int32)
    num_tokens = len(indices) * layout.page_tokens
    targets = torch.randperm(num_tokens + 16, generator=generator)[:num_tokens]
    targets[5] = -1
    balance = _balance(layout, is_balanced)
    num_pages = (num_tokens + 16) // CACHE_TOKENS
    cache, memory = _caches(layout, num_pages, device, torch.float32)
    dequantize_layers(
        _by_layer(pages.to(device)),
        indices.to(device),
        cache,
        targets.to(device),
        layout,
        key_balance=None if balance is None else balance.to(device),
    )
    expected_cache, expected = _caches(layout, num_pages, torch.device("cpu"), torch.float32)
    for number, of_layer in enumerate(_by_layer(pages)):
        reference_slots.dequantize_pages(
            of_layer,
            indices,
            expected_cache.keys[number],
            expected_cache.values[number],
            targets,
            layout,
            key_balance=None if balance is None else balance[number],
        )
    for found, wanted in zip(memory, expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.cpu() == -7.0, wanted == -7.0)


def test_a_cpu_without_the_interpreter_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    test_tokens_of_all_layers_are_packed_as_those_of_each("tq4", True, generator, cpu)
    test_pages_of_all_layers_are_unpacked_as_those_of_each("tq4", True, generator, cpu)


def test_nothing_is_done_for_no_tokens(device: torch.device) -> None:
    layout = layout_of("tq4")
    cache, memory = _caches(layout, 2, device, torch.bfloat16)
    pages = torch.zeros(LAYERS, 1, layout.page_bytes, dtype=torch.uint8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    quantize_layers(cache, none, none, pages, layout)
    dequantize_layers(pages, none.int(), cache, none, layout)
    assert not pages.any()
    assert all((each == -7.0).all() for each in memory)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = layout_of("tq4")
    cache, _ = _caches(layout, 2, device, torch.bfloat16)
    slots = torch.arange(16, device=device)
    pages = torch.zeros(LAYERS, 1, layout.page_bytes, dtype=torch.uint8, device=device)
    for wrong in (pages[:1], pages[0]):
        with pytest.raises(ValueError, match="layers a multiple of 16"):
            quantize_layers(cache, slots, slots, wrong, layout)
    with pytest.raises(ValueError, match="key_balance"):
        quantize_layers(cache, slots, slots, pages, layout, key_balance=torch.ones(2, 64, device=device))
    with pytest.raises(ValueError, match="source_slots"):
        quantize_layers(cache, slots.int(), slots, pages, layout)
    with pytest.raises(ValueError, match="slot_mapping"):
        dequantize_layers(pages, slots[:2].int(), cache, slots, layout)
    other, _ = _caches(layout_of("tq4", 128), 2, device, torch.bfloat16)
    with pytest.raises(ValueError, match="key cache must be"):
        quantize_layers(other, slots, slots, pages, layout)


def test_layers_that_are_not_alike_are_no_cache() -> None:
    one = torch.zeros(2, 8, 2, 64)
    with pytest.raises(ValueError, match="0 keys and 1 values"):
        cache_layers([], [one])
    with pytest.raises(ValueError, match="shape and dtype of the first"):
        cache_layers([one, one[:1]], [one, one])
    with pytest.raises(ValueError, match="strides"):
        cache_layers([one, one], [one, torch.zeros(2, 2, 8, 64).transpose(1, 2)])
    memory = torch.zeros(one.numel() + 8)
    odd = [memory[:-8].view_as(one), memory[8:].view_as(one)]
    with pytest.raises(ValueError, match="no multiple of 16 elements apart"):
        cache_layers([one, one], odd)
