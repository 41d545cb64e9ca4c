"""Sections of cold pages between bytes and integers: header fields, words, and the order of symbols."""

from dataclasses import dataclass

import torch

from tq_kernels._guards import check_page_bytes
from tq_kernels.cold_layout import HEADER_FIELDS, LANES, SECTION_VERSION, ColdLayout
from tq_kernels.cold_scales import Scales, is_top
from tq_kernels.cold_search import CodedSections
from tq_kernels.entropy import FIRST_SCALE_TABLE, NUM_INDEX_TABLES, SCALE_WIDTHS, Reader
from tq_kernels.trellis import NEXT_STATE

_DTYPES = {"B": torch.uint8, "H": torch.int16, "h": torch.int16}


def symbols_of(coded: CodedSections) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols and their tables in reading order: ``[sections, steps, LANES]`` int64."""
    levels = coded.levels.long()
    grids = levels & 1
    symbols = torch.cat((coded.scales.symbols()[..., None], levels - grids >> 1), 3)
    scale_tables = (FIRST_SCALE_TABLE + coded.scales.table)[..., None, None].expand(*levels.shape[:3], 1)
    tables = torch.cat((scale_tables, 2 * coded.tables[..., None, None] + grids), 3)
    return _by_lane(symbols), _by_lane(tables)


def _by_lane(per_vector: torch.Tensor) -> torch.Tensor:
    """``[sections, 2, tokens, n]`` as ``[sections, 2 * tokens / LANES * n, LANES]``."""
    sections, _, tokens, n = per_vector.shape
    turns = per_vector.view(sections, 2 * tokens // LANES, LANES, n)
    return turns.transpose(2, 3).flatten(1, 2)


def write_sections(
    coded: CodedSections,
    center: torch.Tensor,
    states: torch.Tensor,
    words: torch.Tensor,
    num_words: torch.Tensor,
    layout: ColdLayout,
) -> torch.Tensor:
    """Bytes of sections whose words fit: ``[sections, section_bytes]`` uint8.

    Args:
        coded: Their integers.
        center: ``[sections, head_dim]`` fp16.
        states: As `entropy.pack` returns them.
        words: As `entropy.pack` returns them.
        num_words: As `entropy.pack` returns them.
        layout: Geometry.
    """
    sections = torch.zeros(len(center), layout.section_bytes, dtype=torch.uint8, device=center.device)
    fields = {"num_words": num_words, "version": torch.full_like(num_words, SECTION_VERSION)}
    for side, name in enumerate(("key", "value")):
        fields[f"{name}_table"] = coded.tables[:, side]
        fields[f"{name}_octave"] = coded.scales.octave[:, side]
        fields[f"{name}_scale_table"] = coded.scales.table[:, side]
        fields[f"{name}_middle"] = coded.scales.middle[:, side]
        fields[f"{name}_top"] = coded.scales.top[:, side]
    for name, numbers in fields.items():
        field_of(sections, name).copy_(numbers)
    _run(sections, layout.center_offset, layout.states_offset, torch.int16).copy_(center.view(torch.int16))
    _run(sections, layout.states_offset, layout.words_offset, torch.int32).copy_(
        states - (states >> 31 << 32)
    )
    fitting = words[:, : layout.max_words]
    room = _run(sections, layout.words_offset, layout.words_offset + 2 * fitting.shape[1], torch.int16)
    room.copy_(fitting - (fitting >> 15 << 16))
    return sections


def field_of(sections: torch.Tensor, name: str) -> torch.Tensor:
    """A header field of all sections, in place: ``[sections]``."""
    offset, code = HEADER_FIELDS[name]
    return _run(sections, offset, offset + _DTYPES[code].itemsize, _DTYPES[code])[:, 0]


def _run(sections: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes `begin` to `end` of all sections as numbers, in place."""
    return sections[:, begin:end].view(dtype)


@dataclass(frozen=True, slots=True)
class OpenSections:
    """Sections whose headers are sound, ready to be read.

    Args:
        states: ``[sections, LANES]`` int32.
        words: ``[sections, max_words]`` int16, zeros beyond `num_words`; a view with a row stride.
        num_words: ``[sections]`` int64.
        tables: ``[sections, 2]`` int64, tables of indices on grid 0 among all tables; that of grid 1 follows.
        scale_tables: ``[sections, 2]`` int64, tables of scales among all tables.
        scales: Their scales, but with no codes yet.
        center: ``[sections, head_dim]`` float32.
    """

    states: torch.Tensor
    words: torch.Tensor
    num_words: torch.Tensor
    tables: torch.Tensor
    scale_tables: torch.Tensor
    scales: Scales
    center: torch.Tensor

    def scales_of(self, differences: torch.Tensor) -> Scales:
        """Scales with the codes that the symbols ``[sections, 2, tokens]`` stand for."""
        codes = (differences.long() + self.scales.middle[..., None]) & 0xFF
        return Scales(codes, self.scales.top, self.scales.octave, self.scales.middle, self.scales.table)


def open_sections(pages: torch.Tensor, layout: ColdLayout) -> OpenSections:
    """Check everything about sections that can be known before reading them.

    Raises:
        ValueError: Pages of another size or dtype, or headers that no writer produces.
    """
    check_page_bytes(pages, layout)
    # a copy, because views as wider numbers want an alignment
    sections = pages.reshape(len(pages) * layout.num_kv_heads, layout.section_bytes).clone()
    num_words = field_of(sections, "num_words").long() & 0xFFFF
    center = _run(sections, layout.center_offset, layout.states_offset, torch.float16).float()
    table, octave, scale_table, middle, top = (
        torch.stack([field_of(sections, f"{side}_{name}").long() for side in ("key", "value")], 1)
        for name in ("table", "octave", "scale_table", "middle", "top")
    )
    words = _run(sections, layout.words_offset, layout.words_offset + 2 * layout.max_words, torch.int16)
    beyond = torch.arange(layout.max_words, device=pages.device) >= num_words[:, None]
    sound = (
        (field_of(sections, "version") == SECTION_VERSION)
        & (field_of(sections, "reserved") == 0)
        & (num_words <= layout.max_words)
        & ~(beyond & (words != 0)).any(1)
        & (table < NUM_INDEX_TABLES).all(1)
        & is_top(top, octave).all(1)
        & (scale_table < len(SCALE_WIDTHS)).all(1)
        & center.isfinite().all(1)
    )
    refuse_unsound(sound, layout)
    states = _run(sections, layout.states_offset, layout.words_offset, torch.int32)
    scales = Scales(torch.empty_like(table)[..., None], top, octave, middle, scale_table)
    return OpenSections(states, words, num_words, 2 * table, FIRST_SCALE_TABLE + scale_table, scales, center)


def refuse_unsound(sound: torch.Tensor, layout: ColdLayout) -> None:
    """Raise ValueError for the first section that is not sound; waits for the device."""
    if not sound.all():
        page, head = divmod(int((~sound).nonzero()[0]), layout.num_kv_heads)
        raise ValueError(f"head {head} of cold page {page} is damaged")


def read_symbols(opened: OpenSections, layout: ColdLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read sections to their end, all lanes side by side.

    Returns:
        Levels ``[sections, 2, page_tokens, head_dim]`` int8, symbols of scales ``[sections, 2, page_tokens]``
        int64, and whether each section ended as it should: ``[sections]`` bool.
    """
    reader = Reader(opened.states, opened.words, opened.num_words)
    num_sections, head_dim, turns = len(opened.center), layout.head_dim, layout.page_tokens // LANES
    device = opened.center.device
    following = torch.tensor(NEXT_STATE, device=device).flatten()
    levels = torch.empty((2, turns, head_dim, num_sections, LANES), dtype=torch.int8, device=device)
    differences = torch.empty((num_sections, 2, turns, LANES), dtype=torch.int64, device=device)
    for side in (0, 1):
        table, scale_table = (
            each[:, side, None].expand(-1, LANES) for each in (opened.tables, opened.scale_tables)
        )
        for turn in range(turns):
            differences[:, side, turn] = reader.read(scale_table)
            state = torch.zeros_like(table)
            for channel in range(head_dim):
                grid = state & 1
                index = reader.read(table + grid)
                # modulo 256, which is what a byte holds
                levels[side, turn, channel] = 2 * index + grid
                state = following.take(2 * state + (index & 1))
    return levels.permute(3, 0, 1, 4, 2).flatten(2, 3), differences.flatten(2), reader.sound()
