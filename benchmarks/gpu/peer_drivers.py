"""Drivers of other projects' kernels: the same keys and values in each one's pages, at all its settings."""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.peer_load import Candidate, Load
from tq_kernels.codebook import lloyd_max


def _turbo_attn(load: Load) -> Iterator[Candidate]:
    """turbo-attn 0.70.1. Folder: `tkv/` of the wheel and, optionally, its kernels in `built/`."""
    from tkv import TkvCodec
    from tkv.core import packed_dim
    from tkv.kernels.cuda_compress_store import fused_compress_store, fused_cs_layout
    from tkv.kernels.loaders import TkvDecodeLoader
    from tkv.kernels.turbo_attn_simt import tq_splitk_batch_decode

    dim, heads, device = load.head_dim, load.kv_heads, load.keys.device
    codec = TkvCodec(head_dim=dim, k_bit_width=4, v_bit_width=4, device=str(device))
    packed = packed_dim(4, dim)
    layout = fused_cs_layout(heads, packed, packed, page_size=load.page_tokens)
    size = layout["total_bytes"]
    cache = torch.zeros(load.num_pages, load.page_tokens, size, dtype=torch.uint8, device=device)
    loader = TkvDecodeLoader.from_compressed(
        kv_cache=cache,
        k_centroids=codec.k_centroids,
        v_centroids=codec.v_centroids,
        paged_kv_indptr=torch.arange(load.batch + 1, dtype=torch.int32, device=device)
        * load.block_table.shape[1],
        paged_kv_indices=load.block_table.flatten(),
        paged_kv_last_page_len=torch.full((load.batch,), load.page_tokens, dtype=torch.int32, device=device),
        page_size=load.page_tokens,
        num_kv_heads=heads,
        k_packed_off=layout["k_packed_off"],
        k_norm_off=layout["k_norm_off"],
        v_packed_off=layout["v_packed_off"],
        v_norm_off=layout["v_norm_off"],
        k_packed_dim=packed,
        v_packed_dim=packed,
        k_bw=4,
        v_bw=4,
    )
    out = torch.empty_like(load.query)
    prescale = torch.full((dim,), load.scale, dtype=torch.float32, device=device)

    def encode(num_tokens: int) -> None:
        fused_compress_store(
            load.keys[:num_tokens],
            load.values[:num_tokens],
            cache,
            load.slots[:num_tokens],
            codec.k_boundaries,
            codec.v_boundaries,
            dim,
            4,
            4,
            heads,
            k_centroids=codec.k_centroids,
            v_centroids=codec.v_centroids,
            k_norm_correction=True,
        )

    def decode(splits: int, tile: int, per_warp: int, fused: bool) -> Any:
        query = load.query if fused else codec.rotate_query(load.query, scale=load.scale)
        return codec.unrotate_output(
            tq_splitk_batch_decode(
                query,
                loader=loader,
                num_splits=splits,
                max_seq_len=load.context,
                out=out,
                tile_tokens=tile,
                min_blocks_per_sm=0,
                hpw=per_warp,
                fuse_q_rot=fused,
                q_prescale=prescale if fused else None,
            )
        )

    # hpw=8 is its tensor-core body; the other two are the best of its older one
    bodies = [(tile, 8, fused) for fused in (True, False) for tile in (8, 16, 4)]
    for tile, per_warp, fused in [*bodies, (8, 2, False), (16, 1, False)]:
        for splits in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            yield Candidate(
                settings=f"tile {tile}, hpw {per_warp}, {splits} splits" + ", q rotation fused" * fused,
                encode=encode,
                decode=partial(decode, splits, tile, per_warp, fused),
                bytes_per_token=size,
            )


def _vllm(load: Load, *, soa: bool = False) -> Iterator[Candidate]:
    """Kernels of vLLM 0.33. Folder: of `vllm/v1/attention/ops/`, turboquant and what it imports."""
    ops = "vllm.v1.attention.ops"
    dim, heads, device = load.head_dim, load.kv_heads, load.keys.device
    rotation = _hadamard(dim).to(device)
    levels = _lloyd_max(dim).to(device)
    middles = ((levels[1:] + levels[:-1]) / 2).contiguous()
    key_bytes, value_bytes = dim // 2 + 2, dim // 2 + 4
    size = key_bytes + value_bytes
    cache = torch.zeros(load.num_pages, load.page_tokens, heads, size, dtype=torch.uint8, device=device)
    slots = load.slots.to(torch.int32)
    folder = "turboquant_soa." if soa else ""
    store = importlib.import_module(f"{ops}.{folder}triton_turboquant_store").triton_turboquant_store
    extra = {"centroids": levels, "norm_correction": True} if soa else {}

    def encode(num_tokens: int) -> None:
        store(
            load.keys[:num_tokens],
            load.values[:num_tokens],
            cache,
            slots[:num_tokens],
            rotation,
            middles,
            4,
            key_bytes,
            4,
            **extra,
        )

    def decode(splits: int) -> Any:
        return stock.triton_turboquant_decode_attention(
            load.query,
            cache,
            load.block_table,
            load.lengths,
            rotation,
            levels,
            load.scale,
            4,
            key_bytes,
            4,
            norm_correction=True,
            PiT=rotation,
            max_num_kv_splits=splits,
        )

    def decode_soa(tile: int, splits: int, fused: bool) -> Any:
        return unified.triton_turboquant_unified_attention(
            load.query,
            cache,
            load.block_table,
            load.lengths,
            starts,
            rotation,
            levels,
            load.scale,
            4,
            key_bytes,
            4,
            value_bytes,
            norm_correction=True,
            PiT=rotation,
            max_query_len=1,
            max_seq_len=load.context,
            tile_size=tile,
            num_kv_splits=splits,
            fuse_q_rot=fused,
        )

    if soa:
        unified = importlib.import_module(f"{ops}.turboquant_soa.triton_turboquant_unified_attention")
        starts = torch.arange(load.batch + 1, dtype=torch.int32, device=device)
        bodies = [(tile, splits, False) for tile in (16, 32, 64) for splits in (16, 64)]
        for tile, splits, fused in [*bodies, (16, 16, True), (16, 64, True)]:
            yield Candidate(
                settings=f"tile {tile}, {splits} splits" + ", q rotation fused" * fused,
                encode=encode,
                decode=partial(decode_soa, tile, splits, fused),
                bytes_per_token=heads * size,
            )
        return
    stock = importlib.import_module(f"{ops}.triton_turboquant_decode")
    for splits in (32, 8, 16, 64, 128):
        yield Candidate(
            settings=f"{splits} splits" + " (its default)" * (splits == 32),
            encode=encode,
            decode=partial(decode, splits),
            bytes_per_token=heads * size,
        )


def _aither(load: Load) -> Iterator[Candidate]:
    """aither-kvcache 2.4.1. Folder: `turboquant/` of the wheel."""
    from turboquant import TurboQuant
    from turboquant.fused_attention import TQPagedAttention

    dim, heads, device = load.head_dim, load.kv_heads, load.keys.device
    codec = TurboQuant(head_dim=dim, bits=4, device=str(device))
    shape = (load.num_pages, load.page_tokens, heads)
    codes = [torch.zeros(*shape, dim // 2, dtype=torch.uint8, device=device) for _ in range(2)]
    norms = [torch.zeros(*shape, dtype=torch.float32, device=device) for _ in range(2)]

    def encode(num_tokens: int) -> None:
        for raw, code, norm in zip((load.keys, load.values), codes, norms, strict=True):
            packed, length = codec.encode(raw[:num_tokens])
            code.flatten(0, 1)[load.slots[:num_tokens]] = packed
            norm.flatten(0, 1)[load.slots[:num_tokens]] = length.to(torch.float32)

    attention = TQPagedAttention(codec, num_query_heads=load.q_heads)

    def decode(splits: int) -> Any:
        attention.SPLITK_NUM_SPLITS = splits
        # pages go in the order keys, key norms, values, value norms
        return attention._triton_forward(  # noqa: SLF001
            load.query,
            codes[0],
            norms[0],
            codes[1],
            norms[1],
            load.block_table,
            load.lengths,
            load.page_tokens,
            heads,
        )

    for splits in (16, 64):
        yield Candidate(
            settings=f"{splits} splits",
            encode=encode,
            decode=partial(decode, splits),
            bytes_per_token=heads * (dim + 8),
        )


def _turboquant_vllm(load: Load) -> Iterator[Candidate]:
    """turboquant-vllm 1.5.0. Folder: `turboquant_vllm/` of the wheel. It tunes itself on its first call."""
    name = "turboquant_vllm"
    quantizer = importlib.import_module(f"{name}.quantizer").TurboQuantMSE(load.head_dim, 4, seed=42)
    compress = importlib.import_module(f"{name}.triton.tq4_compress").tq4_compress
    attend = importlib.import_module(f"{name}.triton.fused_paged_tq4_attention").fused_paged_tq4_decode
    dim, heads, device = load.head_dim, load.kv_heads, load.keys.device
    rotation = quantizer.rotation.to(device).float()
    turned = rotation.T.contiguous()
    even, odd = turned[:, 0::2].contiguous(), turned[:, 1::2].contiguous()
    boundaries = quantizer.codebook.boundaries.to(device)
    levels = quantizer.codebook.centroids.to(device)
    half = heads * dim // 2
    size = 2 * (half + 4 * heads)
    cache = torch.zeros(load.num_pages, load.page_tokens, size, dtype=torch.uint8, device=device)
    flat = cache.view(-1, size)

    def encode(num_tokens: int) -> None:
        rows = torch.empty(num_tokens, size, dtype=torch.uint8, device=device)
        for raw, at in ((load.keys, 0), (load.values, size // 2)):
            packed, norm = compress(raw[:num_tokens], even, odd, boundaries)
            rows[:, at : at + half] = packed.reshape(num_tokens, -1)
            bytes_of_norms = norm.reshape(num_tokens, heads).contiguous().view(torch.uint8)
            rows[:, at + half : at + half + 4 * heads] = bytes_of_norms
        flat[load.slots[:num_tokens]] = rows

    yield Candidate(
        settings="tuned by itself",
        encode=encode,
        decode=lambda: attend(
            load.query,
            cache,
            load.block_table,
            load.lengths,
            levels,
            rotation,
            heads,
            dim,
            load.page_tokens,
        ),
        bytes_per_token=size,
    )


def _hadamard(order: int) -> torch.Tensor:
    """Orthogonal Hadamard matrix of an order that is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(order)


def _lloyd_max(head_dim: int) -> torch.Tensor:
    """Ascending 4-bit levels of a coordinate of a unit vector."""
    positive = torch.tensor(lloyd_max(4), dtype=torch.float32) * head_dim**-0.5
    return torch.cat((-positive.flip(0), positive))


DRIVERS: dict[str, Callable[[Load], Iterator[Candidate]]] = {
    "turbo-attn": _turbo_attn,
    "vllm": _vllm,
    "vllm-soa": lambda load: _vllm(load, soa=True),
    "aither": _aither,
    "turboquant-vllm": _turboquant_vllm,
}
PAGE_TOKENS = {"turboquant-vllm": (16,), "aither": (16,)}
"""Page sizes to try, where not 16 and 128."""
