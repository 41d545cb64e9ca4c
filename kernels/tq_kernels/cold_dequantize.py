"""Dequantize cold pages on a device: `cold_page.dequantize` with the walk through the words as one kernel."""

import torch

from tq_kernels._dispatch import takes_kernel
from tq_kernels.cold_layout import LANES, ColdLayout
from tq_kernels.cold_page import dequantize, restore
from tq_kernels.cold_sections import OpenSections, open_sections, refuse_unsound
from tq_kernels.device.read_cold import read_cold_sections
from tq_kernels.entropy import reading_table

_SECTIONS = 4
"""Sections of a program: their lanes fill a warp."""


def dequantize_cold(
    pages: torch.Tensor,
    layout: ColdLayout,
    dtype: torch.dtype = torch.bfloat16,
    *,
    key_balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that cold pages stand for; on a CPU by `cold_page.dequantize`.

    Waits for the device, to say whether pages are sound.

    Args:
        pages: ``[num_pages, page_bytes]`` uint8, whatever they hold.
        layout: Geometry, the same as when they were made.
        dtype: Of the result.
        key_balance: The balance with which the pages were made, by which keys are multiplied.

    Returns:
        Keys and values, each ``[num_pages * page_tokens, num_kv_heads, head_dim]``.

    Raises:
        ValueError: Pages of another size or dtype, or bytes that no writer produces.
    """
    if not takes_kernel(pages.device):
        return dequantize(pages, layout, dtype, key_balance=key_balance)
    opened = open_sections(pages, layout)
    levels, differences, sound = read_symbols_on_device(opened, layout)
    refuse_unsound(sound, layout)
    keys, values = restore(levels, opened.scales_of(differences), opened.center, layout, key_balance)
    return keys.to(dtype), values.to(dtype)


def read_symbols_on_device(
    opened: OpenSections, layout: ColdLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cold_sections.read_symbols`, by one kernel that does not wait for anything."""
    num_sections, device = len(opened.center), opened.center.device
    shape = (num_sections, 2, layout.page_tokens)
    levels = torch.empty((*shape, layout.head_dim // 4), dtype=torch.int32, device=device)
    differences = torch.empty(shape, dtype=torch.int32, device=device)
    sound = torch.empty(num_sections, dtype=torch.int32, device=device)
    if num_sections:
        read_cold_sections[(-(-num_sections // _SECTIONS),)](
            p_states=opened.states,
            p_words=opened.words,
            p_num_words=opened.num_words.int(),
            p_tables=opened.tables.int(),
            p_scale_tables=opened.scale_tables.int(),
            p_slots=reading_table(device),
            p_levels=levels,
            p_differences=differences,
            p_sound=sound,
            num_sections=num_sections,
            stride_states=opened.states.stride(0),
            stride_words=opened.words.stride(0),
            PAGE_TOKENS=layout.page_tokens,
            HEAD_DIM=layout.head_dim,
            LANES=LANES,
            SECTIONS=_SECTIONS,
            num_warps=1,
        )
    return levels.view(torch.int8), differences, sound.bool()
