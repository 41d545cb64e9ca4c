"""Pages of a pool on the device: to the same bytes as pages in host memory, and back layer by layer."""

from dataclasses import replace

import pytest
import torch
from connectors.sglang.host_pool import HostMemory

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang.device_pages import DevicePacked, DevicePool, DeviceQuantized, DeviceRows
from tq_connectors.sglang.host_pages import read_host_pool
from tq_connectors.sglang.page_codecs import RowCodec
from tq_connectors.sglang.quantized_pages import QuantizedCodec
from tq_kernels import PageLayout, preset
from tq_store.keys import Part

LAYERS, TOKENS, HEADS, DIM = 3, 16, 2, 32
GEOMETRY = CacheGeometry(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="bfloat16")
LAYOUT = PageLayout(spec=preset("tq4"), head_dim=DIM, num_kv_heads=HEADS, page_tokens=TOKENS)
PART = Part(first_layer=0, num_layers=LAYERS, first_kv_head=0, num_kv_heads=HEADS)
CPU = torch.device("cpu")
PAGES = (3, 1)
"""Pages of the pool that a request has, in its order."""


def pool_of(
    dtype: torch.dtype, *, layers: int = LAYERS, dim: int = DIM, seed: int | None = None
) -> DevicePool:
    shape = (5 * TOKENS, HEADS, dim)
    sides = [[torch.zeros(shape, dtype=dtype) for _ in range(LAYERS)] for _ in range(2)]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for buffer in (*sides[0], *sides[1]):
            if dtype is torch.uint8:
                buffer.random_(256, generator=generator)
            else:
                buffer.copy_(torch.randn(shape, generator=generator))
    return DevicePool(*sides, TOKENS)


def slots_of(pages: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(page * TOKENS, (page + 1) * TOKENS) for page in pages])


def same_in_host_memory(pool: DevicePool) -> list[torch.Tensor]:
    """The pages of the request as SGLang's host pool would hold them."""
    memory = HostMemory(
        "page_first",
        num_pages=2,
        page_size=TOKENS,
        layers=LAYERS,
        heads=HEADS,
        dim=DIM,
        dtype=pool.shape.dtype,
    )
    pages = read_host_pool(memory)
    for place, page in enumerate(PAGES):
        tokens = slice(page * TOKENS, (page + 1) * TOKENS)
        for side, layers in enumerate((pool.keys, pool.values)):
            for layer, buffer in enumerate(layers):
                pages.page(place * TOKENS)[side, layer].view(torch.uint8).copy_(
                    buffer[tokens].view(torch.uint8)
                )
    return [pages.page(place * TOKENS) for place in range(len(PAGES))]


def load(codec, packed: torch.Tensor, model_layers: int, pages: tuple[int, ...]) -> None:
    stored = packed.unflatten(1, (model_layers, -1)).transpose(0, 1)
    for layer in range(LAYERS):
        codec.unpack_layer(stored, layer, slots_of(pages))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_rows_are_those_of_host_memory_and_come_back(dtype):
    saved, loaded = pool_of(dtype, seed=1), pool_of(dtype)
    codec = DeviceRows(saved, GEOMETRY, saved.shape)
    packed = codec.pack(slots_of(PAGES).split(TOKENS))
    assert torch.equal(packed, RowCodec(GEOMETRY, saved.shape).pack(same_in_host_memory(saved)))
    load(DeviceRows(loaded, GEOMETRY, loaded.shape), packed, LAYERS, (0, 4))
    for side in range(2):
        for layer in range(LAYERS):
            found = loaded.read(side, layer, slots_of((0, 4))).view(torch.uint8)
            assert torch.equal(found, saved.read(side, layer, slots_of(PAGES)).view(torch.uint8))
            assert not loaded.read(side, layer, slots_of((1, 2, 3))).view(torch.uint8).any()


@pytest.mark.parametrize("num_layers", [5, 6])
def test_packed_pages_pass_through(num_layers):
    saved, loaded = (pool_of(torch.uint8, dim=LAYOUT.slot_bytes, seed=seed) for seed in (1, 2))
    part = replace(PART, num_layers=num_layers)
    packed = DevicePacked(saved, LAYOUT, num_layers, part).pack(slots_of(PAGES).split(TOKENS))
    assert packed.shape == (2, num_layers * LAYOUT.page_bytes)
    page = packed[0].view(num_layers, LAYOUT.page_bytes)
    assert torch.equal(page[1], saved.values[0][3 * TOKENS : 4 * TOKENS].flatten())
    load(DevicePacked(loaded, LAYOUT, num_layers, part), packed, num_layers, PAGES)
    for layer in range(num_layers):
        side, pair = layer % 2, layer // 2
        slots = slots_of(PAGES)
        assert torch.equal(loaded.read(side, pair, slots), saved.read(side, pair, slots))


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_pages_packed_on_the_way_are_those_of_host_memory_and_come_back(dtype, is_balanced):
    saved, loaded = pool_of(dtype, seed=1), pool_of(dtype)
    balance = torch.linspace(0.5, 2, DIM).expand(LAYERS, HEADS, DIM) if is_balanced else None
    arguments = (LAYOUT, LAYERS, PART, CPU, balance)
    packed = DeviceQuantized(saved, *arguments).pack(slots_of(PAGES).split(TOKENS))
    assert torch.equal(packed, QuantizedCodec(*arguments).pack(same_in_host_memory(saved)))
    load(DeviceQuantized(loaded, *arguments), packed, LAYERS, (0, 4))
    for side in range(2):
        for layer in range(LAYERS):
            found = loaded.read(side, layer, slots_of((0, 4))).float()
            error = (found - saved.read(side, layer, slots_of(PAGES)).float()).square().mean()
            assert 0 < error < 0.02
