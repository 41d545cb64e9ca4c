"""Indices to words and back, along the last axis, bit for bit as `layout.WORD_FORMATS` says."""

import torch

from tq_kernels.layout import WORD_FORMATS, WordFormat
from tq_kernels.spec import Code


def pack(indices: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pack the last axis.

    Args:
        indices: ``[..., n]`` of any integer dtype. For Lloyd-Max codes an index is a magnitude with the sign
            above it; for the others it is the byte or the 16 bits of the value.
        code: Decides the word format; n must be a multiple of its elements.

    Returns:
        Words ``[..., n / elements]`` int32, and sign words of the same shape as int16 or None.
    """
    form = WORD_FORMATS[code]
    lanes = _lanes(indices.to(torch.int32), form)
    words = torch.zeros(lanes.shape[:-2], dtype=torch.int32, device=indices.device)
    signs = torch.zeros_like(words) if form.sign_plane else None
    magnitude_mask = (1 << form.magnitude_bits) - 1
    for group in range(form.groups):
        for lane in range(form.lanes):
            index = lanes[..., group, lane]
            words |= (index & magnitude_mask) << form.magnitude_shifts[group][lane]
            if form.sign_shifts:
                sign = ((index >> form.magnitude_bits) & 1) << form.sign_shifts[group][lane]
                if signs is None:
                    words |= sign
                else:
                    signs |= sign
    return words, None if signs is None else signs.to(torch.int16)


def unpack(words: torch.Tensor, signs: torch.Tensor | None, code: Code) -> torch.Tensor:
    """Undo `pack`: indices ``[..., n]`` int32."""
    form = WORD_FORMATS[code]
    lanes = torch.empty(
        (*words.shape[:-1], form.groups, words.shape[-1], form.lanes), dtype=torch.int32, device=words.device
    )
    sign_words = words if signs is None else signs.to(torch.int32)
    magnitude_mask = (1 << form.magnitude_bits) - 1
    for group in range(form.groups):
        for lane in range(form.lanes):
            index = (words >> form.magnitude_shifts[group][lane]) & magnitude_mask
            if form.sign_shifts:
                index |= ((sign_words >> form.sign_shifts[group][lane]) & 1) << form.magnitude_bits
            lanes[..., group, :, lane] = index
    return lanes.flatten(-3)


def _lanes(indices: torch.Tensor, form: WordFormat) -> torch.Tensor:
    """``[..., n]`` as ``[..., words, groups, lanes]``."""
    size = indices.shape[-1]
    if size % form.elements:
        raise ValueError(f"an axis of {size} elements does not fill words of {form.elements}")
    by_group = indices.reshape(*indices.shape[:-1], form.groups, size // form.elements, form.lanes)
    return by_group.transpose(-3, -2)
