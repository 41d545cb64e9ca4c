"""Dequantize cold pages on a device: `cold_page.dequantize` with the walk through the words as one kernel."""

import torch

from tq_kernels._dispatch import takes_kernel
from tq_kernels.cold_layout import LANES, ColdLayout
from tq_kernels.cold_page import dequantize
from tq_kernels.cold_sections import OpenSections, read_symbols
from tq_kernels.compiled import launch
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
    """`cold_page.dequantize`, on a GPU by a kernel; waits for the device, to say whether pages are sound."""
    read = read_symbols_on_device if takes_kernel(pages.device) else read_symbols
    return dequantize(pages, layout, dtype, key_balance=key_balance, read=read)


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
        launch(
            read_cold_sections,
            (-(-num_sections // _SECTIONS),),
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
