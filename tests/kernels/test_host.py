"""The CPU path writes the bytes of the reference, where sums are exact, and reads them the same."""

import pytest
import torch

from tq_kernels import (
    PRESETS,
    CodecSpec,
    PageLayout,
    host,
    host_loops,
    host_rotation,
    host_tokens,
    preset,
    reference,
)
from tq_kernels.reference import plane_view
from tq_kernels.rotation import rotation_matrix
from tq_kernels.spec import DEFAULT_ROTATION_SEED

from .hard_inputs import HARD_INPUTS, hard_input
from .slot_cases import exact_tokens, layout_of
from .tolerances import QUANTIZE_FLIPS, rotation_error

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


def assert_alike(pages: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the few bytes that another order of sums turns."""
    assert (pages != expected).float().mean() < QUANTIZE_FLIPS


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
    assert_alike(pages, reference.quantize(keys, values, layout))
    sides = torch.empty_like(keys), torch.empty_like(values)
    host.dequantize(pages, layout, *sides)
    for side, expected in zip(sides, reference.dequantize(pages, layout, torch.bfloat16), strict=True):
        torch.testing.assert_close(side, expected, rtol=2**-7, atol=1e-6)  # one unit of bfloat16


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("fp8", "raw")])
@pytest.mark.parametrize(
    ("head_dim", "heads", "page_tokens"), [(128, 2, 64), (64, 3, 16), (256, 1, 32), (512, 1, 16)]
)
def test_where_every_sum_is_exact_every_byte_is_the_references(name, head_dim, heads, page_tokens, generator):
    layout = layout_of(name, head_dim, heads, page_tokens)
    exact = exact_tokens(layout, list(range(3 * page_tokens)), 3, generator)
    pages = pages_of(layout, 3)
    host.quantize(exact.keys, exact.values, layout, pages)
    assert torch.equal(pages, reference.quantize(exact.keys, exact.values, layout))


@pytest.mark.parametrize("name", ["tq2", "tq3", "tq4", "k8v4"])
@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_hard_inputs_come_out_as_in_the_reference(name, kind, generator):
    layout = PageLayout(spec=preset(name), head_dim=64, num_kv_heads=2, page_tokens=16)
    keys, values = (hard_input(kind, 64, generator)[:64].view(32, 2, 64) for _ in range(2))
    pages = pages_of(layout, 2)
    host.quantize(keys, values, layout, pages)
    assert_alike(pages, reference.quantize(keys, values, layout))


@pytest.mark.parametrize("key", ["tq4", "k8v4"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_none_come_out_as_in_the_reference(number, key, generator):
    spec = CodecSpec(key=preset(key).key, value=preset("tq3").value)
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
    assert_alike(pages, reference.quantize(keys, values, layout))
    back = torch.zeros_like(chunk)
    host.dequantize(pages, layout, back[:, :, 0], back[:, :, 1])
    expected = torch.stack(reference.dequantize(pages, layout, torch.bfloat16), dim=2)
    torch.testing.assert_close(back, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256, 512])
def test_butterflies_rotate_as_the_matrix_does_and_back(head_dim, generator):
    vectors = torch.randn(3 * host_rotation.VECTORS_AT_ONCE, head_dim, generator=generator)
    rotated = vectors.clone()
    host_rotation.rotator(head_dim, DEFAULT_ROTATION_SEED, inverse=False)(rotated.view(-1).numpy())
    exact = vectors.double() @ rotation_matrix(head_dim, DEFAULT_ROTATION_SEED).double().T
    limit = rotation_error(head_dim) * torch.linalg.vector_norm(vectors, dim=-1).max()
    assert (rotated - exact).abs().max() < limit
    host_rotation.rotator(head_dim, DEFAULT_ROTATION_SEED, inverse=True)(rotated.view(-1).numpy())
    assert (rotated - vectors).abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_tokens_of_every_dtype_are_read_and_rounded_as_pytorch_does(dtype, generator):
    layout = layout_of("tq4", 64, 2, 16)
    keys, values = (torch.randn(32, 2, 64, generator=generator).to(dtype) for _ in range(2))
    pages, expected = pages_of(layout, 2), pages_of(layout, 2)
    host.quantize(keys, values, layout, pages)
    host.quantize(keys.float(), values.float(), layout, expected)
    assert torch.equal(pages, expected)
    found, wanted = [torch.empty_like(keys) for _ in range(2)], [torch.empty(32, 2, 64) for _ in range(2)]
    host.dequantize(pages, layout, *found)
    host.dequantize(pages, layout, *wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.float(), other.to(dtype).float())


def test_what_is_no_number_stays_none(generator):
    layout = layout_of("tq4", 64, 1, 16)
    keys = torch.randn(16, 1, 64, generator=generator).bfloat16()
    pages = pages_of(layout, 1)
    host.quantize(keys, keys, layout, pages)
    for number in (float("nan"), float("inf")):
        plane_view(pages, layout, "value_scales")[..., 0, 3] = torch.tensor(number).half().view(torch.int16)
        host.dequantize(pages, layout, keys, keys)
        assert not keys[3].isfinite().any()
        assert keys[2].isfinite().all()


def test_pages_may_lie_apart(generator):
    layout = layout_of("tq4")
    keys, values = tokens(layout, 3, generator)
    dense, room = pages_of(layout, 3), torch.full((3, layout.page_bytes + 16), 0xA5, dtype=torch.uint8)
    host.quantize(keys, values, layout, dense)
    host.quantize(keys, values, layout, room[:, :-16])
    assert torch.equal(room[:, :-16], dense)
    assert (room[:, -16:] == 0xA5).all()
    back = [torch.empty_like(keys) for _ in range(4)]
    host.dequantize(dense, layout, *back[:2])
    host.dequantize(room[:, :-16], layout, *back[2:])
    assert torch.equal(torch.stack(back[:2]), torch.stack(back[2:]))


def test_a_layout_is_prepared_before_its_first_tokens():
    layout = layout_of("k3v2", head_dim=32)
    host.prepare(layout)
    loops = (host_loops.index_writer(layout.spec.key, is_value=False), host_tokens.loader(is_bits=True))
    compiled = [len(loop.signatures) for loop in loops]
    chunk = torch.randn(16, 2, 2, 32).bfloat16()
    host.quantize(chunk[:, :, 0], chunk[:, :, 1], layout, pages_of(layout, 1))
    assert [len(loop.signatures) for loop in loops] == compiled


def test_a_shape_that_does_not_fit_is_refused():
    layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=2, page_tokens=16)
    keys = torch.zeros(17, 2, 64)
    with pytest.raises(ValueError, match="not whole pages"):
        host.quantize(keys, keys, layout, pages_of(layout, 1))
    with pytest.raises(ValueError, match="must both be"):
        host.dequantize(pages_of(layout, 1), layout, keys[:16], keys[:16, :1])
    with pytest.raises(ValueError, match="pages"):
        host.quantize(keys[:16], keys[:16], layout, pages_of(layout, 2))
