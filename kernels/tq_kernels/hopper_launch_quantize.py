"""The launch of the Hopper kernel that quantizes many tokens."""

from functools import lru_cache

import torch

from tq_kernels import hopper_quantize
from tq_kernels._cell_words import cell_words
from tq_kernels.compiled import launch
from tq_kernels.decode_plan import machine_of
from tq_kernels.device.hopper_quantize import quantize_windows
from tq_kernels.layout import PageLayout
from tq_kernels.reference import rotation_of


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rotation_columns(layout: PageLayout, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The integer matrix d R, ``[head_dim, head_dim]``, rows in the order of the product's columns."""
    head_dim = layout.head_dim
    integers = (rotation_of(layout, torch.device("cpu")) * head_dim).round()
    column = torch.arange(head_dim)
    place = column // 8
    word = column // 2 % 4 * (head_dim // 32) + place // 4
    channel = place // 2 % 2 * (head_dim // 2) + word * 4 + place % 2 * 2 + column % 2
    return integers[channel].to(device, dtype)


def launch_windows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    *,
    seed_pages: torch.Tensor | None,
    key_balance: torch.Tensor | None,
    sinks: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    layers: tuple[torch.Tensor, torch.Tensor] | None = None,
    source_slots: torch.Tensor | None = None,
) -> None:
    """Write tokens of one layer or, out of their caches, of several.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, or a cache of the first layer, ``[num_cache_pages,
            cache_page_tokens, num_kv_heads, head_dim]``; such as `hopper_quantize.serves`.
        values: Likewise.
        slot_mapping: As in `quantize.quantize_slots`.
        pages: ``[num_pages, page_bytes]`` uint8, or with layers before that.
        layout: Of the pages.
        seed_pages: As in `quantize.quantize_slots`.
        key_balance: ``[num_kv_heads, head_dim]`` float32, or with layers before that, or None.
        sinks: sink_slots, sink_keys and sink_values; with layers there are none.
        layers: As `CacheLayers.offsets`.
        source_slots: Token in the cache of every token, with layers.
    """
    num_tokens, in_cache = len(slot_mapping), layers is not None
    num_layers = 1 if layers is None else len(layers[0])
    items = -(-num_tokens // layout.page_tokens) * num_layers * layout.num_kv_heads
    programs = hopper_quantize.programs_per_processor(layout) * machine_of(keys.device).num_processors
    sink_slots, sink_keys, sink_values = sinks
    launch(
        quantize_windows,
        (min(2 * items, programs),),
        hopper_quantize.constants(layout, keys.shape[1] if in_cache else 0),
        p_keys=keys,
        p_values=values,
        p_slots=slot_mapping,
        p_sources=source_slots,
        p_key_layers=None if layers is None else layers[0],
        p_value_layers=None if layers is None else layers[1],
        p_seeds=seed_pages,
        p_balance=key_balance,
        p_rotation=_rotation_columns(layout, pages.device, keys.dtype),
        p_cells=cell_words(layout, pages.device),
        p_pages=pages,
        p_sink_slots=sink_slots,
        p_sink_keys=sink_keys,
        p_sink_values=sink_values,
        num_tokens=num_tokens,
        num_layers=num_layers,
        key_page_stride=keys.stride(0) if in_cache else 0,
        key_token_stride=keys.stride(-3),
        key_head_stride=keys.stride(-2),
        value_page_stride=values.stride(0) if in_cache else 0,
        value_token_stride=values.stride(-3),
        value_head_stride=values.stride(-2),
        page_layer_stride=pages.stride(0) if in_cache else 0,
        page_stride=pages.stride(-2),
        sink_token_stride=0 if sink_keys is None else sink_keys.stride(0),
        sink_head_stride=0 if sink_keys is None else sink_keys.stride(1),
        num_warps=hopper_quantize.WARPS,
        maxnreg=hopper_quantize.max_registers(layout),
    )
