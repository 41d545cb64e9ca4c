"""Pages for storage: the bytes of an LM page spent on trellis levels and an entropy code.

A cold page holds what a page of `tq_kernels.layout` holds, at about half the error for the same bytes, and no
kernel attends to it: it is written once and dequantized whole. Plain PyTorch, on any device.

A vector is rotated, keys less the centre of their page, brought to unit variance, divided by a step and
written as the nearest path of levels L. Its scale |z| / |L| keeps the length, as in LM pages, so that no
reader needs the step.
"""

from collections.abc import Callable

import torch

from tq_kernels._guards import check_tokens
from tq_kernels.cold_layout import ColdLayout, section_bytes_for
from tq_kernels.cold_scales import REACH_OCTAVES, Scales, dequantize_scales
from tq_kernels.cold_search import CodedSections, fill
from tq_kernels.cold_sections import (
    OpenSections,
    open_sections,
    read_symbols,
    refuse_unsound,
    symbols_of,
    write_sections,
)
from tq_kernels.entropy import pack
from tq_kernels.reference import FP16_MAX
from tq_kernels.rotation import rotation_matrix
from tq_kernels.spec import DEFAULT_ROTATION_SEED

KEY_EXTRA_BITS = 0.5
"""Bits that an index of a key gets more than one of a value, where nobody says: errors of keys pass through
an exponential, those of values are averaged, and at equal size the former count about twice as much."""

ReadSymbols = Callable[[OpenSections, ColdLayout], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""`cold_sections.read_symbols`, or a kernel that does the same."""


def quantize(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: ColdLayout,
    *,
    key_balance: torch.Tensor | None = None,
    key_extra_bits: float = KEY_EXTRA_BITS,
) -> torch.Tensor:
    """Whole cold pages from keys and values.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, floating point; num_tokens a multiple of page_tokens.
        values: The same shape.
        layout: Geometry.
        key_balance: ``[num_kv_heads, head_dim]`` float32 by which keys are divided before anything else.
        key_extra_bits: How many bits an index of a key is to have more than one of a value; readers need not
            know.

    Returns:
        Pages ``[num_tokens / page_tokens, page_bytes]`` uint8.

    Raises:
        ValueError: A shape that does not fit the layout, or numbers that are not finite or too large.
    """
    vectors, center = _vectors(keys, values, layout, key_balance)
    budget = _budget_bits(vectors, layout)
    coded = fill(vectors, budget, key_extra_bits=key_extra_bits)
    packed = pack(*symbols_of(coded))
    # a state is a whole number, so a section can take a little more than its bits add up to
    while len(over := torch.nonzero(packed[2] > layout.max_words)[:, 0]):
        budget[over] -= 16.0 * (packed[2][over] - layout.max_words + 1)
        coded.replace(over, fill(vectors[over], budget[over], key_extra_bits=key_extra_bits))
        packed = pack(*symbols_of(coded))
    sections = write_sections(coded, _settled(center, vectors, coded), *packed, layout)
    return sections.view(len(sections) // layout.num_kv_heads, layout.page_bytes)


def _budget_bits(vectors: torch.Tensor, layout: ColdLayout) -> torch.Tensor:
    return torch.full((len(vectors),), 16.0 * layout.max_words, device=vectors.device)


def _vectors(
    keys: torch.Tensor, values: torch.Tensor, layout: ColdLayout, key_balance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be coded, ``[sections, 2, page_tokens, head_dim]``, and key centres as fp16."""
    check_tokens(keys, values, layout)
    key, value = (_by_section(tensor, layout) for tensor in (keys, values))
    if key_balance is not None:
        key = key / key_balance.repeat(len(key) // layout.num_kv_heads, 1)[:, None]
    rotation = rotation_matrix(layout.head_dim, layout.rotation_seed).to(keys.device)
    key, value = key @ rotation.T, value @ rotation.T
    center = key.mean(1).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
    vectors = torch.stack((key - center.float()[:, None], value), 1)
    # not `>`, which a nan would pass
    if not (torch.linalg.vector_norm(vectors, dim=-1) <= 2.0**REACH_OCTAVES).all():
        raise ValueError(f"keys and values must be finite, and no longer than 2^{REACH_OCTAVES}")
    return vectors, center


def _settled(center: torch.Tensor, vectors: torch.Tensor, coded: CodedSections) -> torch.Tensor:
    """The centre that gives restored keys the mean of the keys: ``[sections, head_dim]`` fp16.

    Without it a page that is loaded and saved again would move by the mean error each time.
    """
    restored = coded.levels[:, 0] * dequantize_scales(coded.scales)[:, 0, :, None]
    mean_error = (vectors[:, 0] - restored).mean(1)
    return (center.float() + mean_error).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def _by_section(tensor: torch.Tensor, layout: ColdLayout) -> torch.Tensor:
    """``[num_tokens, heads, dim]`` as float32 ``[pages * heads, page_tokens, dim]``."""
    by_page = tensor.float().reshape(-1, layout.page_tokens, *tensor.shape[1:])
    return by_page.transpose(1, 2).flatten(0, 1)


def dequantize(
    pages: torch.Tensor,
    layout: ColdLayout,
    dtype: torch.dtype = torch.float32,
    *,
    key_balance: torch.Tensor | None = None,
    read: ReadSymbols = read_symbols,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that cold pages stand for.

    Args:
        pages: ``[num_pages, page_bytes]`` uint8, whatever they hold.
        layout: Geometry, the same as when they were made.
        dtype: Of the result.
        key_balance: The balance with which the pages were made, by which keys are multiplied.
        read: What walks through the words.

    Returns:
        Keys and values, each ``[num_pages * page_tokens, num_kv_heads, head_dim]``.

    Raises:
        ValueError: Pages of another size or dtype, or bytes that no writer produces.
    """
    levels, scales, center = read_levels(pages, layout, read)
    keys, values = restore(levels, scales, center, layout, key_balance)
    return keys.to(dtype), values.to(dtype)


def restore(
    levels: torch.Tensor,
    scales: Scales,
    center: torch.Tensor,
    layout: ColdLayout,
    key_balance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, float32, from what `read_levels` returns."""
    vectors = levels.float() * dequantize_scales(scales)[..., None]
    vectors[:, 0] += center[:, None]
    vectors = vectors @ rotation_matrix(layout.head_dim, layout.rotation_seed).to(levels.device)
    if key_balance is not None:
        vectors[:, 0] *= key_balance.repeat(len(vectors) // layout.num_kv_heads, 1)[:, None]
    num_pages = len(vectors) // layout.num_kv_heads
    keys, values = (
        vectors.view(num_pages, layout.num_kv_heads, *vectors.shape[1:]).permute(2, 0, 3, 1, 4).flatten(1, 2)
    )
    return keys, values


def read_levels(
    pages: torch.Tensor, layout: ColdLayout, read: ReadSymbols = read_symbols
) -> tuple[torch.Tensor, Scales, torch.Tensor]:
    """The integers of cold pages, checked.

    Returns:
        Levels ``[sections, 2, page_tokens, head_dim]`` int8, their scales, and key centres
        ``[sections, head_dim]`` float32.

    Raises:
        ValueError: As for `dequantize`.
    """
    opened = open_sections(pages, layout)
    levels, differences, sound = read(opened, layout)
    refuse_unsound(sound, layout)
    return levels, opened.scales_of(differences), opened.center


def roundtrip(
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    bits: float | None = None,
    section_bytes: int | None = None,
    key_balance: torch.Tensor | None = None,
    key_extra_bits: float = KEY_EXTRA_BITS,
    page_tokens: int = 128,
    seed: int = DEFAULT_ROTATION_SEED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dequantize` makes of what `quantize` made, without bytes in between; for measuring quality.

    A token takes ``section_bytes / page_tokens`` bytes a head, keys and values and all else together.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_dim]``, num_tokens a multiple of page_tokens.
        values: The same shape.
        bits: Bits of an index, mean of keys and values; stands for ``section_bytes_for(bits, ...)``.
        section_bytes: Bytes of a page and head, such as `PageLayout.section_bytes`; this or `bits`.
        key_balance: As for `quantize`.
        key_extra_bits: As for `quantize`.
        page_tokens: Tokens of a page.
        seed: Seed of the rotation.

    Returns:
        Keys and values, float32, of the same shape.

    Raises:
        ValueError: As for `quantize`, or not one of `bits` and `section_bytes`.
    """
    if (bits is None) == (section_bytes is None):
        raise ValueError("give either bits or section_bytes")
    layout = ColdLayout(
        head_dim=keys.shape[2],
        num_kv_heads=keys.shape[1],
        page_tokens=page_tokens,
        section_bytes=section_bytes or section_bytes_for(bits or 0, keys.shape[2], page_tokens),
        rotation_seed=seed,
    )
    vectors, center = _vectors(keys, values, layout, key_balance)
    coded = fill(vectors, _budget_bits(vectors, layout), key_extra_bits=key_extra_bits)
    center = _settled(center, vectors, coded)
    return restore(coded.levels, coded.scales, center.float(), layout, key_balance)
