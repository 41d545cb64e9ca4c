"""The CPU path writes the bytes of the reference, and reads them the same."""

import pytest
import torch

from tq_kernels import PRESETS, CodecSpec, PageLayout, host, preset, reference
from tq_kernels.codebook import LEVELS, midpoints

from .hard_inputs import HARD_INPUTS, hard_input

SHAPES = [
    # head_dim, heads, page_tokens, pages: less than a tile, more than one, sizes that are no power of two
    (128, 8, 64, 5),
    (64, 2, 128, 9),
    (96, 3, 32, 4),
    (256, 1, 16, 3),
    (512, 1, 64, 5),  # squared levels no longer add up exactly
]


def pages_of(layout: PageLayout, count: int) -> torch.Tensor:
    return torch.full((count, layout.page_bytes), 0xA5, dtype=torch.uint8)


def tokens(layout: PageLayout, pages: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages * layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    length = torch.rand(*shape[:2], 1, generator=generator) * 4
    keys, values = (torch.randn(shape, generator=generator) * length for _ in range(2))
    keys[1], values[2] = 0, 0
    return keys.bfloat16(), values.bfloat16()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("head_dim", "heads", "page_tokens", "count"), SHAPES)
def test_bytes_and_numbers_are_those_of_the_reference(
    name, head_dim, heads, page_tokens, count, generator, monkeypatch
):
    monkeypatch.setattr(host, "_TILE_ELEMENTS", 1 << 15)
    layout = PageLayout(spec=preset(name), head_dim=head_dim, num_kv_heads=heads, page_tokens=page_tokens)
    keys, values = tokens(layout, count, generator)
    pages = pages_of(layout, count)
    host.quantize(keys, values, layout, pages)
    assert torch.equal(pages, reference.quantize(keys, values, layout))
    sides = torch.empty_like(keys), torch.empty_like(values)
    host.dequantize(pages, layout, *sides)
    for side, expected in zip(sides, reference.dequantize(pages, layout, torch.bfloat16), strict=True):
        torch.testing.assert_close(side, expected, rtol=2**-7, atol=1e-6)  # one unit of bfloat16


@pytest.mark.parametrize("name", ["tq2", "tq3", "tq4", "k8v4"])
@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_hard_inputs_come_out_as_in_the_reference(name, kind, generator):
    layout = PageLayout(spec=preset(name), head_dim=64, num_kv_heads=2, page_tokens=16)
    keys, values = (hard_input(kind, 64, generator)[:64].view(32, 2, 64) for _ in range(2))
    pages = pages_of(layout, 2)
    host.quantize(keys, values, layout, pages)
    assert torch.equal(pages, reference.quantize(keys, values, layout))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_none_come_out_as_in_the_reference(number, generator):
    spec = CodecSpec(key=preset("tq4").key, value=preset("tq3").value)
    layout = PageLayout(spec=spec, head_dim=64, num_kv_heads=1, page_tokens=16)
    keys, values = (torch.randn(16, 1, 64, generator=generator) for _ in range(2))
    keys[3, 0, 5] = values[4, 0, 6] = number
    pages = pages_of(layout, 1)
    host.quantize(keys, values, layout, pages)
    assert torch.equal(pages, reference.quantize(keys, values, layout))


def test_views_of_an_engines_chunk_are_read_and_written_in_place(generator):
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    chunk = torch.randn(32, 2, 2, 64, generator=generator).bfloat16()  # keys and values side by side
    keys, values = chunk[:, :, 0], chunk[:, :, 1]
    pages = pages_of(layout, 2)
    host.quantize(keys, values, layout, pages)
    assert torch.equal(pages, reference.quantize(keys, values, layout))
    back = torch.zeros_like(chunk)
    host.dequantize(pages, layout, back[:, :, 0], back[:, :, 1])
    expected = torch.stack(reference.dequantize(pages, layout, torch.bfloat16), dim=2)
    torch.testing.assert_close(back, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("code", LEVELS)
def test_boundaries_are_whole_eighths(code):
    assert all((8 * boundary).is_integer() for boundary in midpoints(LEVELS[code]))


def test_a_shape_that_does_not_fit_is_refused():
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    keys = torch.zeros(17, 2, 64)
    with pytest.raises(ValueError, match="not whole pages"):
        host.quantize(keys, keys, layout, pages_of(layout, 1))
    with pytest.raises(ValueError, match="must both be"):
        host.dequantize(pages_of(layout, 1), layout, keys[:16], keys[:16, :1])
    with pytest.raises(ValueError, match="pages"):
        host.quantize(keys[:16], keys[:16], layout, pages_of(layout, 2))
