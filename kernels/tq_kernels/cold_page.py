"""Pages for storage: the bytes of an LM page spent on trellis levels and an entropy code.

A cold page holds what a page of `tq_kernels.layout` holds, at about half the error for the same bytes, and no
kernel attends to it: it is written once and dequantized whole. Plain PyTorch, on any device.

A vector is rotated, keys less the centre of their page, brought to unit variance, divided by a step and
written as the nearest path of levels L. Its scale |z| / |L| keeps the length, as in LM pages, so that no
reader needs the step.
"""

import torch

from tq_kernels.cold_layout import (
    HEADER_FIELDS,
    LANES,
    SECTION_VERSION,
    ColdLayout,
    section_bytes_for,
)
from tq_kernels.cold_scales import REACH_OCTAVES, Scales, dequantize_scales, is_top
from tq_kernels.cold_search import CodedSections, fill
from tq_kernels.entropy import FIRST_SCALE_TABLE, NUM_INDEX_TABLES, SCALE_WIDTHS, Reader, pack
from tq_kernels.reference import FP16_MAX
from tq_kernels.rotation import rotation_matrix
from tq_kernels.spec import DEFAULT_ROTATION_SEED
from tq_kernels.trellis import NEXT_STATE

_DTYPES = {"B": torch.uint8, "H": torch.int16, "h": torch.int16}


def quantize(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: ColdLayout,
    *,
    key_balance: torch.Tensor | None = None,
    key_extra_bits: float = 0.0,
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
    packed = pack(*_symbols(coded))
    # a state is a whole number, so a section can take a little more than its bits add up to
    while len(over := torch.nonzero(packed[2] > layout.max_words)[:, 0]):
        budget[over] -= 16.0 * (packed[2][over] - layout.max_words + 1)
        coded.replace(over, fill(vectors[over], budget[over], key_extra_bits=key_extra_bits))
        packed = pack(*_symbols(coded))
    return _write(coded, _settled(center, vectors, coded), *packed, layout)


def _budget_bits(vectors: torch.Tensor, layout: ColdLayout) -> torch.Tensor:
    return torch.full((len(vectors),), 16.0 * layout.max_words, device=vectors.device)


def _vectors(
    keys: torch.Tensor, values: torch.Tensor, layout: ColdLayout, key_balance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be coded, ``[sections, 2, page_tokens, head_dim]``, and key centres as fp16."""
    if keys.shape != values.shape:
        raise ValueError(f"keys and values differ in shape: {list(keys.shape)} and {list(values.shape)}")
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
    heads, dim = layout.num_kv_heads, layout.head_dim
    if tensor.dim() != 3 or tuple(tensor.shape[1:]) != (heads, dim) or tensor.shape[0] % layout.page_tokens:
        raise ValueError(
            f"keys and values must both be [whole pages of {layout.page_tokens}, {heads}, {dim}], "
            f"not {list(tensor.shape)}"
        )
    by_page = (tensor.shape[0] // layout.page_tokens, layout.page_tokens, heads, dim)
    return tensor.float().reshape(by_page).transpose(1, 2).flatten(0, 1)


def _symbols(coded: CodedSections) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols and their tables in reading order: ``[sections, steps, LANES]`` int64."""
    levels = coded.levels.long()
    grids = levels & 1
    indices = torch.cat((coded.scales.symbols()[..., None], levels - grids >> 1), 3)
    scale_tables = (FIRST_SCALE_TABLE + coded.scales.table)[..., None, None].expand(*levels.shape[:3], 1)
    tables = torch.cat((scale_tables, 2 * coded.tables[..., None, None] + grids), 3)
    return _by_lane(indices), _by_lane(tables)


def _by_lane(per_vector: torch.Tensor) -> torch.Tensor:
    """``[sections, 2, tokens, n]`` as ``[sections, 2 * tokens / LANES * n, LANES]``."""
    sections, _, tokens, n = per_vector.shape
    turns = per_vector.view(sections, 2 * tokens // LANES, LANES, n)
    return turns.transpose(2, 3).flatten(1, 2)


def _write(
    coded: CodedSections,
    center: torch.Tensor,
    states: torch.Tensor,
    words: torch.Tensor,
    num_words: torch.Tensor,
    layout: ColdLayout,
) -> torch.Tensor:
    sections = torch.zeros(len(center), layout.section_bytes, dtype=torch.uint8, device=center.device)
    fields = {"num_words": num_words, "version": torch.full_like(num_words, SECTION_VERSION)}
    for side, name in enumerate(("key", "value")):
        fields[f"{name}_table"] = coded.tables[:, side]
        fields[f"{name}_octave"] = coded.scales.octave[:, side]
        fields[f"{name}_scale_table"] = coded.scales.table[:, side]
        fields[f"{name}_middle"] = coded.scales.middle[:, side]
        fields[f"{name}_top"] = coded.scales.top[:, side]
    for name, numbers in fields.items():
        _field(sections, name).copy_(numbers)
    _run(sections, layout.center_offset, layout.states_offset, torch.int16).copy_(center.view(torch.int16))
    _run(sections, layout.states_offset, layout.words_offset, torch.int32).copy_(
        states - (states >> 31 << 32)
    )
    fitting = words[:, : layout.max_words]
    room = _run(sections, layout.words_offset, layout.words_offset + 2 * fitting.shape[1], torch.int16)
    room.copy_(fitting - (fitting >> 15 << 16))
    return sections.view(len(sections) // layout.num_kv_heads, layout.page_bytes)


def _field(sections: torch.Tensor, name: str) -> torch.Tensor:
    """A header field of all sections, in place: ``[sections]``."""
    offset, code = HEADER_FIELDS[name]
    return _run(sections, offset, offset + _DTYPES[code].itemsize, _DTYPES[code])[:, 0]


def _run(sections: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes `begin` to `end` of all sections as numbers, in place."""
    return sections[:, begin:end].view(dtype)


def dequantize(
    pages: torch.Tensor,
    layout: ColdLayout,
    dtype: torch.dtype = torch.float32,
    *,
    key_balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that cold pages stand for.

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
    levels, scales, center = read_levels(pages, layout)
    keys, values = _restore(levels, scales, center, layout, key_balance)
    return keys.to(dtype), values.to(dtype)


def _restore(
    levels: torch.Tensor,
    scales: Scales,
    center: torch.Tensor,
    layout: ColdLayout,
    key_balance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
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


def read_levels(pages: torch.Tensor, layout: ColdLayout) -> tuple[torch.Tensor, Scales, torch.Tensor]:
    """The integers of cold pages, checked.

    Returns:
        Levels ``[sections, 2, page_tokens, head_dim]`` int8, their scales, and key centres
        ``[sections, head_dim]`` float32.

    Raises:
        ValueError: As for `dequantize`.
    """
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != layout.page_bytes:
        raise ValueError(
            f"pages must be [num_pages, {layout.page_bytes}] uint8, not {list(pages.shape)} {pages.dtype}"
        )
    # a copy, because views as wider numbers want an alignment
    sections = pages.reshape(len(pages) * layout.num_kv_heads, layout.section_bytes).clone()
    fields = {name: _field(sections, name) for name in HEADER_FIELDS}
    num_words = fields["num_words"].long() & 0xFFFF
    center = _run(sections, layout.center_offset, layout.states_offset, torch.float16).float()
    both = {
        name: torch.stack((fields[f"key_{name}"], fields[f"value_{name}"]), 1)
        for name in ("table", "octave", "scale_table", "middle", "top")
    }
    words = _run(sections, layout.words_offset, layout.words_offset + 2 * layout.max_words, torch.int16)
    beyond = torch.arange(layout.max_words, device=pages.device) >= num_words[:, None]
    sound = (
        (fields["version"] == SECTION_VERSION)
        & (fields["reserved"] == 0)
        & (num_words <= layout.max_words)
        & ~(beyond & (words != 0)).any(1)
        & (both["table"] < NUM_INDEX_TABLES).all(1)
        & is_top(both["top"].long(), both["octave"].long()).all(1)
        & (both["scale_table"] < len(SCALE_WIDTHS)).all(1)
        & center.isfinite().all(1)
    )
    _refuse(~sound, layout)
    reader = Reader(_run(sections, layout.states_offset, layout.words_offset, torch.int32), words, num_words)
    scale_tables = FIRST_SCALE_TABLE + both["scale_table"].long()
    levels, differences = _walk(reader, 2 * both["table"].long(), scale_tables, layout)
    _refuse(~reader.sound(), layout)
    codes = (differences + both["middle"].long()[..., None]) & 0xFF
    scales = Scales(codes, *(both[name].long() for name in ("top", "octave", "middle", "scale_table")))
    return levels, scales, center


def _refuse(bad: torch.Tensor, layout: ColdLayout) -> None:
    if bad.any():
        page, head = divmod(int(bad.nonzero()[0]), layout.num_kv_heads)
        raise ValueError(f"head {head} of cold page {page} is damaged")


def _walk(
    reader: Reader, tables: torch.Tensor, scale_tables: torch.Tensor, layout: ColdLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """All lanes through all their vectors: levels ``[sections, 2, tokens, head_dim]``, scale symbols."""
    num_sections, head_dim, rounds = len(tables), layout.head_dim, layout.page_tokens // LANES
    shape = (num_sections, 2, rounds, LANES)
    following = torch.tensor(NEXT_STATE, device=tables.device).flatten()
    levels = torch.empty((2, rounds, head_dim, num_sections, LANES), dtype=torch.int8, device=tables.device)
    differences = torch.empty(shape, dtype=torch.int64, device=tables.device)
    for side in (0, 1):
        table, scale_table = (each[:, side, None].expand(-1, LANES) for each in (tables, scale_tables))
        for turn in range(rounds):
            differences[:, side, turn] = reader.read(scale_table)
            state = torch.zeros_like(table)
            for channel in range(head_dim):
                grid = state & 1
                index = reader.read(table + grid)
                # modulo 256, which is what a byte holds
                levels[side, turn, channel] = 2 * index + grid
                state = following.take(2 * state + (index & 1))
    return levels.permute(3, 0, 1, 4, 2).flatten(2, 3), differences.flatten(2)


def roundtrip(
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    bits: float | None = None,
    section_bytes: int | None = None,
    key_balance: torch.Tensor | None = None,
    key_extra_bits: float = 0.0,
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
    return _restore(coded.levels, coded.scales, center.float(), layout, key_balance)
