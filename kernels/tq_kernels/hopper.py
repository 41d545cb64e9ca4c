"""Where the Hopper kernels apply, what they take of the machine, and the thread layouts that they want."""

from functools import lru_cache
from typing import Any

from tq_kernels.layout import WORD_FORMATS, PageLayout
from tq_kernels.ptx import level_bytes, levels_of_groups
from tq_kernels.spec import Code, KeyCenter

CAPABILITY = (9, 0)
"""NVIDIA's compute capability of H100, H200 and GH200."""

MOST_REGISTERS = 255
"""Of a thread, on any NVIDIA card."""

_GLUON_RELEASES = ("3.6.",)
_STRIP_ROWS = 16
_CHANNELS_OF_A_LOAD = 32
_COLUMNS_MULTIPLE = 8
_MEASURED_HEAD_DIM = 128
_REGISTERS_OF_A_QUARTER = 1 << 14
_WARP = 32
_SHORTEST_SHARE_TOKENS = 64
_BUSY_PROGRAMS = 2
"""Programs of a multiprocessor below which even the shortest shares pay."""
_SHARES_OF_FEW = (2, 4, 8, 16)
"""Strips of a split: powers of two, which divide pages or are whole ones."""
_MOST_SPLITS_OF_FEW = 32
_BLOCK_COLUMNS = 16
"""Columns of a program: an accumulator of more does not fit the registers; others read the pages again."""


def serves(layout: PageLayout) -> bool:
    """Whether the kernel reads such pages: coded values, and sizes whose words fill its fragments."""
    spec, head_dim = layout.spec, layout.head_dim
    power_of_two = head_dim & (head_dim - 1) == 0 and layout.page_tokens & (layout.page_tokens - 1) == 0
    strips = layout.page_tokens // strip_tokens(layout)
    return (
        spec.key.rotated
        and spec.value in (Code.LM2, Code.LM3, Code.LM4)
        and power_of_two
        and 64 <= head_dim <= 256
        and strips >= 1
    )


def compiles_with(triton_version: str) -> bool:
    """Whether the kernel was run with such a release of Triton; Gluon's interface is not a stable one yet."""
    return triton_version.startswith(_GLUON_RELEASES)


def strip_tokens(layout: PageLayout) -> int:
    """Tokens that a program holds at once: those of four rows of value words."""
    return _STRIP_ROWS * WORD_FORMATS[layout.spec.value].groups


def columns_of_a_program(padded_columns: int) -> int:
    """Columns that share a read of the pages."""
    return min(padded_columns, _BLOCK_COLUMNS)


def rotates_queries(layout: PageLayout, padded_columns: int) -> bool:
    """Whether each program rotates the queries itself, while its first words are on their way."""
    return padded_columns == _COLUMNS_MULTIPLE and layout.head_dim <= _MEASURED_HEAD_DIM


def most_splits(layout: PageLayout, programs: int, num_processors: int, num_strips: int) -> int:
    """Most splits of strips worth their start and their merge, for so many programs without splits."""
    splits = num_strips * strip_tokens(layout) // max(_SHORTEST_SHARE_TOKENS, strip_tokens(layout))
    return splits if programs * splits >= _BUSY_PROGRAMS * num_processors else num_strips


def few_serve(
    layout: PageLayout, programs: int, num_processors: int, num_splits: int, num_strips: int
) -> bool:
    """Whether programs with all registers, in one wave, beat more programs with fewer, as measured."""
    share, rest = divmod(num_strips, num_splits)
    return (
        layout.head_dim == _MEASURED_HEAD_DIM
        and programs * num_splits <= num_processors * resident_programs(MOST_REGISTERS)
        and rest == 0
        and share in _SHARES_OF_FEW
        and num_splits <= _MOST_SPLITS_OF_FEW
    )


def max_registers(layout: PageLayout, padded_columns: int) -> int:
    """Most registers of a thread, of many programs: fewer where the loop then hardly spills, as measured."""
    spec, head_dim = layout.spec, layout.head_dim
    four_bits = spec.key is Code.LM4 and spec.value is Code.LM4
    if padded_columns > _COLUMNS_MULTIPLE or head_dim > _MEASURED_HEAD_DIM:
        return MOST_REGISTERS
    if head_dim < _MEASURED_HEAD_DIM:
        return 128 if four_bits else 168
    return 168 if four_bits else MOST_REGISTERS


def resident_programs(num_registers: int) -> int:
    """Programs, of one warp each, whose registers the quarters of a multiprocessor hold at once."""
    return 4 * (_REGISTERS_OF_A_QUARTER // (_WARP * num_registers))


@lru_cache(maxsize=64)
def constants(
    layout: PageLayout,
    *,
    rows: int,
    group: int,
    padded: int,
    tile_columns: int,
    window: bool,
    softcap: bool,
    raw: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, thread layouts among them; the same object for the same call."""
    from triton.experimental.gluon import language as gl

    head_dim, words = layout.head_dim, layout.head_dim // WORD_FORMATS[layout.spec.key].elements
    together = min(4, words // 4)
    """Key words that a thread loads at once."""
    return {
        "KEY": int(layout.spec.key),
        "VALUE": int(layout.spec.value),
        "D": head_dim,
        "P": layout.page_tokens,
        "SECTION": layout.section_bytes,
        "COLUMNS": rows * group,
        "PADDED": padded,
        "N": tile_columns,
        "BLOCKS": padded // tile_columns,
        "ROWS": rows,
        "GROUP": group,
        "K_WORDS": _offset(layout, "key_words"),
        "K_SIGNS": _offset(layout, "key_signs"),
        "V_WORDS": _offset(layout, "value_words"),
        "V_SIGNS": _offset(layout, "value_signs"),
        "K_SCALES": _offset(layout, "key_scales"),
        "V_SCALES": _offset(layout, "value_scales"),
        "CENTER": _offset(layout, "key_center"),
        "HAS_CENTER": layout.spec.key_center is not KeyCenter.NONE,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "VEC": together,
        "RAW": raw,
        "K_ASM": levels_of_groups(layout.spec.key),
        "V_ASM": levels_of_groups(layout.spec.value),
        "K_TABLE": level_bytes(layout.spec.key),
        "V_TABLE": level_bytes(layout.spec.value),
        "L_ACC": gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]),
        "L_KEYS": gl.DistributedLinearLayout(
            reg_bases=[
                *([0, bit] for bit in _bits(together)),
                *([0, bit] for bit in _bits(words) if bit >= 4 * together),
                [8, 0],
            ],
            lane_bases=[[0, together], [0, 2 * together], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[_STRIP_ROWS, words],
        ),
        "L_VALUES": gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], *([0, bit] for bit in _bits(head_dim) if bit >= _CHANNELS_OF_A_LOAD)],
            lane_bases=[[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]],
            warp_bases=[],
            block_bases=[],
            shape=[4, head_dim],
        ),
        "L_QUERY": gl.DistributedLinearLayout(
            reg_bases=[
                *([0, bit] for bit in _bits(4 * together)),
                *([0, bit] for bit in _bits(head_dim) if bit >= 16 * together),
                *([bit, 0] for bit in _bits(tile_columns) if bit >= _COLUMNS_MULTIPLE),
            ],
            lane_bases=[[0, 4 * together], [0, 8 * together], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[tile_columns, head_dim],
        ),
        "L_CENTERS": gl.DistributedLinearLayout(
            reg_bases=[
                *([0, bit] for bit in _bits(4 * together)),
                *([0, bit] for bit in _bits(head_dim) if bit >= 16 * together),
                [8, 0],
            ],
            lane_bases=[[0, 4 * together], [0, 8 * together], [1, 0], [2, 0], [4, 0]],
            warp_bases=[],
            block_bases=[],
            shape=[_STRIP_ROWS, head_dim],
        ),
        "L_OUT": gl.DistributedLinearLayout(
            reg_bases=[
                [0, 1],
                [0, 2],
                [1, 0],
                *([bit, 0] for bit in _bits(tile_columns) if bit >= _COLUMNS_MULTIPLE),
                *([0, bit] for bit in _bits(head_dim) if bit >= _CHANNELS_OF_A_LOAD),
            ],
            lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
            warp_bases=[],
            block_bases=[],
            shape=[tile_columns, head_dim],
        ),
    }


def _bits(size: int) -> list[int]:
    """Powers of two below a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]


def _offset(layout: PageLayout, name: str) -> int:
    plane = layout.plane(name)
    return plane.offset if plane else 0
