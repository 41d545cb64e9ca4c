"""Pages to payloads and back: exactly as they were, or as exactly as their preset says."""

from dataclasses import replace

import pytest
import torch
from connectors.sglang.host_pool import SHAPES, HostMemory

from tq_connectors.codec import CacheGeometry
from tq_connectors.sglang.host_pages import HostPages, read_host_pool
from tq_connectors.sglang.packed_pages import PackedCodec
from tq_connectors.sglang.page_codecs import RowCodec
from tq_connectors.sglang.quantized_pages import QuantizedCodec
from tq_kernels import PageLayout, preset, reference
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Part, part_key

CPU = torch.device("cpu")
KEY = BlockKey(bytes(BLOCK_KEY_BYTES))
GEOMETRY = CacheGeometry(num_layers=6, num_kv_heads=8, head_dim=32, kv_dtype="bfloat16")
PART = Part(first_layer=2, num_layers=3, first_kv_head=4, num_kv_heads=2)
WHOLE_LAYOUT = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=8, page_tokens=16)
SIZES = {"num_pages": 4, "page_size": 16, "layers": 3, "heads": 2, "dim": 32}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


def pool_of(layout: str, dtype: torch.dtype, seed: int | None = None) -> HostPages:
    pool = HostMemory(layout, **SIZES, dtype=dtype)
    return read_host_pool(pool if seed is None else pool.fill(seed))


def all_pages(pages: HostPages) -> list[torch.Tensor]:
    return [pages.page(index) for index in range(0, 64, 16)]


def quantized(name: str, key_balance: torch.Tensor | None = None) -> QuantizedCodec:
    return QuantizedCodec(replace(WHOLE_LAYOUT, spec=preset(name)), 6, PART, CPU, key_balance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", SHAPES)
def test_rows_come_back_as_they_were_in_a_pool_of_any_layout(layout, dtype):
    saved, loaded = pool_of(layout, dtype, seed=1), pool_of("page_first_direct", dtype)
    codec = RowCodec(GEOMETRY, saved.shape)
    packed = codec.pack(all_pages(saved))
    assert packed.shape == (4, codec.info(KEY, PART).payload_bytes)
    codec.unpack(packed, all_pages(loaded))
    for page, original in zip(all_pages(loaded), all_pages(saved), strict=True):
        assert torch.equal(page.view(torch.uint8), original.view(torch.uint8))


def test_a_range_of_heads_is_a_range_of_bytes_of_each_layer():
    whole = pool_of("layer_first", torch.float32, seed=1)
    (packed,) = RowCodec(GEOMETRY, whole.shape).pack([whole.page(0)])
    (alone,) = RowCodec(GEOMETRY, replace(whole.shape, num_kv_heads=1)).pack([whole.page(0)[:, :, :, 1:]])
    assert torch.equal(packed.view(3, 2, -1)[:, 1].flatten(), alone)


@pytest.mark.parametrize("num_layers", [5, 6])
@pytest.mark.parametrize("layout", [name for name in SHAPES if name != "page_head"])
def test_pages_that_are_packed_already_pass_through(layout, num_layers):
    rank = replace(WHOLE_LAYOUT, num_kv_heads=2)
    sizes = SIZES | {"dim": rank.slot_bytes}
    saved, loaded = (read_host_pool(HostMemory(layout, **sizes, dtype=torch.uint8)) for _ in "ab")
    codec = PackedCodec(WHOLE_LAYOUT, num_layers, replace(PART, first_layer=0, num_layers=num_layers))
    made = torch.randint(0, 256, (num_layers, rank.page_bytes), dtype=torch.uint8)
    for page in all_pages(saved):
        for layer in range(num_layers):
            page[layer % 2, layer // 2].copy_(made[layer].view(16, 2, rank.slot_bytes))
    packed = codec.pack(all_pages(saved))
    assert all(torch.equal(row, made.flatten()) for row in packed)
    codec.unpack(packed, all_pages(loaded))
    assert torch.equal(loaded.pool.kv_buffer, saved.pool.kv_buffer)
    loaded.pool.kv_buffer.zero_()
    for row, page in zip(packed, all_pages(loaded), strict=True):
        codec.copy_to(page)(row.numpy().data)
    assert torch.equal(loaded.pool.kv_buffer, saved.pool.kv_buffer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", SHAPES)
def test_packed_pages_are_those_of_the_reference(layout, dtype):
    saved, loaded = pool_of(layout, dtype, seed=1), pool_of(layout, dtype)
    codec = quantized("tq4")
    packed = codec.pack(all_pages(saved))
    page_layout = PageLayout(spec=preset("tq4"), head_dim=32, num_kv_heads=2, page_tokens=16)
    for row, page in zip(packed, all_pages(saved), strict=True):
        keys, values = page.flatten(1, 2).float()
        expected = reference.quantize(keys, values, page_layout)
        # rotated in another order of sums, which may turn one number in a thousand
        assert (row != expected.flatten()).float().mean() < 1e-3
    codec.unpack(packed, all_pages(loaded))
    for page, original in zip(all_pages(loaded), all_pages(saved), strict=True):
        error = (page.float() - original.float()).square().mean() / original.float().square().mean()
        assert 0 < error < 0.012


def test_a_device_and_the_host_read_pages_alike():
    (page, *_), loaded = all_pages(pool_of("page_first", torch.float16, seed=1)), []
    host, device = quantized("tq4"), quantized("tq4")
    device._on_host = False  # what runs on a GPU, on the CPU
    packed = device.pack([page])
    for codec in (host, device):
        loaded.append(pool_of("page_first", torch.float16).page(0))
        codec.unpack(packed, loaded[-1:])
    assert (loaded[0].float() - loaded[1].float()).abs().max() <= 0.01  # the last bits of the dtype
    assert 0 < (loaded[0].float() - page.float()).square().mean() < 0.012


def test_a_stream_is_waited_for_when_pages_cannot_be_filled():
    class Stream:
        waits = 0

        def synchronize(self):
            self.waits += 1

    pages, codec = all_pages(pool_of("page_first", torch.float16, seed=1)), quantized("tq4")
    packed = codec.pack(pages)
    codec._stream = Stream()
    with pytest.raises(ValueError, match="could not broadcast"):
        codec.unpack(packed, [*pages[:3], pages[3][:, :, :5]])
    assert codec._stream.waits == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_pool_never_gets_a_number_it_cannot_hold(dtype):
    saved, loaded = pool_of("page_first", dtype), pool_of("page_first", dtype)
    for page in all_pages(saved):
        page.copy_(torch.full(page.shape, torch.finfo(dtype).max).index_fill_(4, torch.tensor([0]), 0))
    codec = quantized("tq2")
    codec.unpack(codec.pack(all_pages(saved)), all_pages(loaded))
    for page in all_pages(loaded):
        assert page.float().isfinite().all()
        assert page.float().max() == torch.finfo(dtype).max


def test_a_balance_divides_keys_and_multiplies_them_again():
    saved, loaded = pool_of("layer_first", torch.float32, seed=1), pool_of("layer_first", torch.float32)
    balance = torch.ones(3, 2, 32)
    balance[1, 0, 5] = 16
    for page in all_pages(saved):
        page[0, 1, :, 0, 5] *= 16  # an outlier channel, as some models' keys have
    errors = []
    for codec in (quantized("tq3"), quantized("tq3", balance)):
        codec.unpack(codec.pack(all_pages(saved)), all_pages(loaded))
        others = [channel for channel in range(32) if channel != 5]
        errors.append(
            sum(
                (page[0, 1, :, 0, others] - original[0, 1, :, 0, others]).square().mean()
                for page, original in zip(all_pages(loaded), all_pages(saved), strict=True)
            )
        )
    assert errors[1] < errors[0] / 4


def test_headers_say_what_the_block_holds():
    shape = pool_of("layer_first", torch.bfloat16).shape
    rows, packed = RowCodec(GEOMETRY, shape).info(KEY, PART), quantized("tq4").info(KEY, PART)
    for info in (rows, packed):
        assert (info.first_layer, info.num_layers) == (2, 3)
        assert (info.first_kv_head, info.num_kv_heads, info.total_kv_heads) == (4, 2, 8)
        assert (info.num_tokens, info.page_tokens, info.head_dim) == (16, 16, 32)
        assert info.key == part_key(KEY, PART, GEOMETRY.whole)
    assert rows.payload_bytes == shape.page_bytes
    assert (rows.codec_id, packed.codec_id) == (5, 1)


def test_fingerprints_tell_dtypes_and_presets_apart():
    shape = pool_of("layer_first", torch.bfloat16).shape
    codecs = [RowCodec(GEOMETRY, replace(shape, dtype=dtype)) for dtype in FLOATS]
    codecs += [quantized(name) for name in ("tq4", "tq3", "raw")]
    assert len({codec.fingerprint for codec in codecs}) == len(codecs)
