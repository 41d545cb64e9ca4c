"""Plain float32 PyTorch for pages addressed by slots: the truth for `quantize_slots` and `dequantize_pages`.

A slot is page * page_tokens + offset. What a launch brings to one page is a run; `quantize.py` says what a
run does to its page, and this file does it one page at a time, on any device, without a kernel.
"""

import torch

from tq_kernels.layout import PageLayout
from tq_kernels.packing import pack, unpack
from tq_kernels.reference import (
    FP16_MAX,
    nearest_indices,
    plane_view,
    read_key_center,
    read_side,
    rotation_of,
    value_gain,
)
from tq_kernels.spec import Code, KeyCenter


def quantize_slots(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor | None = None,
    key_balance: torch.Tensor | None = None,
    search: bool = True,
) -> None:
    """Write tokens into packed pages, in place, as `tq_kernels.quantize.quantize_slots` does.

    `search` is its plan's.
    """
    slots = slot_mapping.tolist()
    runs: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            runs.setdefault(slot // layout.page_tokens, []).append(token)
    for number, tokens in runs.items():
        page = pages[number : number + 1]
        offsets = [slots[token] % layout.page_tokens for token in tokens]
        key, value = (side[tokens].float().transpose(0, 1)[None] for side in (keys, values))
        if key_balance is not None:
            key = key / key_balance[:, None, :]
        if layout.spec.key.rotated:
            key = key @ rotation_of(layout, pages.device).T
        if layout.spec.value.rotated:
            value = value @ rotation_of(layout, pages.device).T
        if 0 in offsets:
            seed = -1 if seed_pages is None else int(seed_pages[tokens[offsets.index(0)]])
            _open_page(page, layout, key, None if seed < 0 else pages[seed : seed + 1])
        center = read_key_center(page, layout)
        if center is not None:
            key = key - center[:, :, None]
        _write_tokens(page, layout, "key", offsets, *nearest_indices(key, layout.spec.key, search=search))
        gain = value_gain(layout.spec.value, search=search)
        indices = nearest_indices(value, layout.spec.value, search=search, gain=gain)
        _write_tokens(page, layout, "value", offsets, *indices)


def keep_sinks(
    keys: torch.Tensor,
    values: torch.Tensor,
    sink_slots: torch.Tensor,
    sink_keys: torch.Tensor,
    sink_values: torch.Tensor,
) -> None:
    """Copy tokens to their sink slots, in place, as `tq_kernels.quantize.quantize_slots` does."""
    wanted = sink_slots >= 0
    slots = sink_slots[wanted].long()
    sink_keys[slots] = keys[wanted].to(sink_keys.dtype)
    sink_values[slots] = values[wanted].to(sink_values.dtype)


def dequantize_pages(
    pages: torch.Tensor,
    page_indices: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    *,
    key_balance: torch.Tensor | None = None,
    rotated: bool = False,
) -> None:
    """Scatter tokens of pages, in place, as `tq_kernels.dequantize.dequantize_pages` does."""
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted].long()
    chosen = pages[page_indices.long()]
    for side, code, cache in (
        ("key", layout.spec.key, key_cache),
        ("value", layout.spec.value, value_cache),
    ):
        vectors = _vectors(chosen, layout, side, code)
        if code.rotated and not rotated:
            vectors = vectors @ rotation_of(layout, pages.device)
        if side == "key" and key_balance is not None and not rotated:
            vectors = vectors * key_balance[:, None, :]
        tokens = vectors.transpose(1, 2).flatten(0, 1)[wanted]
        cache[slots // cache.shape[1], slots % cache.shape[1]] = tokens.to(cache.dtype)


def _open_page(page: torch.Tensor, layout: PageLayout, keys: torch.Tensor, seed: torch.Tensor | None) -> None:
    """Set the centre, from rotated keys ``[1, num_kv_heads, run, head_dim]`` or a seed; zero the padding."""
    last = layout.planes[-1]
    sections = page.view(layout.num_kv_heads, layout.section_bytes)
    sections[:, last.offset + last.num_bytes :] = 0
    if layout.spec.key_center is KeyCenter.NONE:
        return
    center = keys.mean(dim=2).clamp(-FP16_MAX, FP16_MAX).to(torch.float16).view(torch.int16)
    if seed is not None and keys.shape[2] < layout.page_tokens:
        center = plane_view(seed, layout, "key_center")[..., 0, :]
    plane_view(page, layout, "key_center")[..., 0, :] = center


def _write_tokens(
    page: torch.Tensor,
    layout: PageLayout,
    side: str,
    offsets: list[int],
    indices: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Indices ``[1, num_kv_heads, run, head_dim]`` among those of other tokens: no bit is in two tokens."""
    code = layout.spec.key if side == "key" else layout.spec.value
    names = [f"{side}_words", f"{side}_signs"] if layout.plane(f"{side}_signs") else [f"{side}_words"]
    planes = [plane_view(page, layout, name) for name in names]
    if side == "value":
        planes = [plane.transpose(-1, -2) for plane in planes]
    held = unpack(planes[0], planes[1] if len(planes) > 1 else None, code)
    if side == "value":
        held = held.transpose(-1, -2)
    held[:, :, offsets] = indices
    words, signs = pack(held.transpose(-1, -2) if side == "value" else held, code)
    planes[0].copy_(words)
    if signs is not None:
        planes[1].copy_(signs)
    if scales is not None:
        plane_view(page, layout, f"{side}_scales")[..., 0, offsets] = scales.view(torch.int16)


def _vectors(pages: torch.Tensor, layout: PageLayout, side: str, code: Code) -> torch.Tensor:
    """Vectors as they were packed, ``[num_pages, num_kv_heads, page_tokens, head_dim]`` float32."""
    levels, scales = read_side(pages, layout, side)
    if scales is not None:
        levels = levels * scales[..., None]
    center = read_key_center(pages, layout) if side == "key" else None
    return levels if center is None else levels + center[:, :, None]
