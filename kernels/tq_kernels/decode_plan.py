"""How decode attention is cut for a machine: pure functions of capacities, so that graphs stay right."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from tq_kernels import hopper
from tq_kernels.layout import PageLayout

MAX_GROUP = 16
MAX_ROWS = 16

_FEWEST_COLUMNS = 8
_MOST_TILE_COLUMNS = 64
_MOST_MERGE_COLUMNS = 16
_MOST_SPLITS = 512
_SPLIT_TOKENS = 256
"""What starting and ending a split costs, in tokens that could have been read instead."""
_GOOD_ENOUGH = 1.03
"""Of the numbers of splits that come this close to the best, the smallest leaves least to merge."""
_PLAIN_OCCUPANCY = {4: (3, 168), 8: (1, 255)}
"""Plain programs of so many warps on a multiprocessor of 64k registers, and registers of a thread."""
_PROCESSORS_WITHOUT_A_GPU = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What plans depend on.

    Args:
        capability: NVIDIA's compute capability, or None anywhere else.
        num_processors: Multiprocessors.
        gluon: Whether Triton is of a release that the Hopper kernel is known to compile with.
    """

    capability: tuple[int, int] | None
    num_processors: int
    gluon: bool = False


@lru_cache(maxsize=32)
def machine_of(device: torch.device) -> Machine:
    """The machine behind a device."""
    if device.type != "cuda":
        return Machine(capability=None, num_processors=_PROCESSORS_WITHOUT_A_GPU)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor) if torch.version.hip is None else None
    return Machine(
        capability=capability,
        num_processors=properties.multi_processor_count,
        gluon=capability == hopper.CAPABILITY and _gluon_is_known(),
    )


def _gluon_is_known() -> bool:
    import triton  # on a Hopper card it is there

    return hopper.compiles_with(triton.__version__)


Variant = Literal["plain", "hopper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How a decode is cut. A column is a query row of a query head of one KV head.

    Args:
        variant: The split kernel: "plain" is Triton's ordinary path, "hopper" loads fragments.
        columns: Query rows times query heads a KV head.
        padded_columns: Columns of the prepared query: a power of two up to 64, then a multiple of 64.
        tile_columns: Columns of a program.
        tile_tokens: Tokens that a program holds at once.
        num_splits: Programs over the pages of one sequence, KV head and tile of columns: their shares are
            whole pages of the plain variant, whole strips of the Hopper kernel.
        num_warps: Warps of a program.
        num_registers: Most registers of a thread.
        merge_columns: Columns of a program that merges splits.
    """

    variant: Variant
    columns: int
    padded_columns: int
    tile_columns: int
    tile_tokens: int
    num_splits: int
    num_warps: int
    num_registers: int
    merge_columns: int


def plan_decode(
    layout: PageLayout,
    machine: Machine,
    *,
    num_seqs: int,
    num_query_heads: int,
    max_pages: int,
    rows: int = 1,
    variant: Variant | None = None,
) -> DecodePlan:
    """The plan for so many sequences of up to max_pages pages, with `rows` queries each.

    It is the best one of the variant, if the caller names one.
    """
    columns = rows * num_query_heads // layout.num_kv_heads
    padded = padded_columns(columns)
    pairs = num_seqs * layout.num_kv_heads
    variant = variant or choose_variant(machine, layout)
    if variant == "hopper":
        tile_columns, num_warps = hopper.columns_of_a_program(padded), 1
        tile_tokens = hopper.strip_tokens(layout)
        programs = pairs * (padded // tile_columns)
        splits, num_registers = _hopper_splits(layout, machine, padded, programs, max_pages)
    else:
        tile_columns, tile_tokens, num_warps = _tile(layout, padded)
        resident, num_registers = _PLAIN_OCCUPANCY[num_warps]
        programs = pairs * (padded // tile_columns)
        splits = num_splits(programs, machine.num_processors * resident, max_pages, layout.page_tokens)
    return DecodePlan(
        variant=variant,
        columns=columns,
        padded_columns=padded,
        tile_columns=tile_columns,
        tile_tokens=tile_tokens,
        num_splits=splits,
        num_warps=num_warps,
        num_registers=num_registers,
        merge_columns=1 if variant == "hopper" else merge_columns(columns, pairs, machine),
    )


def _hopper_splits(
    layout: PageLayout, machine: Machine, padded: int, programs: int, max_pages: int
) -> tuple[int, int]:
    """Splits, and registers of a thread, for so many programs without splits."""
    strip_tokens = hopper.strip_tokens(layout)
    num_strips = max_pages * (layout.page_tokens // strip_tokens)
    most = hopper.most_splits(layout, programs, machine.num_processors, num_strips)

    def splits_with(num_registers: int) -> int:
        resident = machine.num_processors * hopper.resident_programs(num_registers)
        return num_splits(programs, resident, num_strips, strip_tokens, most)

    num_registers = hopper.max_registers(layout, padded)
    few = splits_with(hopper.MOST_REGISTERS)
    if num_registers == hopper.MOST_REGISTERS or hopper.few_serve(
        layout, programs, machine.num_processors, few, num_strips
    ):
        return few, hopper.MOST_REGISTERS
    return splits_with(num_registers), num_registers


@lru_cache(maxsize=64)
def choose_variant(machine: Machine, layout: PageLayout) -> Variant:
    """The split kernel for a machine and a page."""
    fits = machine.capability == hopper.CAPABILITY and machine.gluon and hopper.serves(layout)
    return "hopper" if fits else "plain"


def padded_columns(columns: int) -> int:
    """Columns of the prepared query, which tiles of columns divide."""
    if columns <= _MOST_TILE_COLUMNS:
        return max(_FEWEST_COLUMNS, 1 << (columns - 1).bit_length())
    return -(-columns // _MOST_TILE_COLUMNS) * _MOST_TILE_COLUMNS


def merge_columns(columns: int, pairs: int, machine: Machine) -> int:
    """As many columns a program as leave two programs to every processor; each reads the rotation anew."""
    tile = min(_MOST_MERGE_COLUMNS, 1 << (columns - 1).bit_length())
    while tile > 1 and pairs * -(-columns // tile) < 2 * machine.num_processors:
        tile //= 2
    return tile


def _tile(layout: PageLayout, padded: int) -> tuple[int, int, int]:
    """Columns, tokens and warps of a program, such that its tiles fit in registers."""
    wide = layout.head_dim > 128
    columns = min(padded, _MOST_TILE_COLUMNS // 2 if wide else _MOST_TILE_COLUMNS)
    whole = not wide and columns <= 16 and max(layout.spec.key.bits, layout.spec.value.bits) <= 4
    tokens = min(layout.page_tokens, 128 if whole else 64)
    return columns, tokens, 8 if columns * layout.head_dim > 32 * 128 else 4


@lru_cache(maxsize=1024)
def num_splits(
    programs: int, resident: int, most_shares: int, share_tokens: int, most_splits: int = _MOST_SPLITS
) -> int:
    """Few splits that keep the machine's waves of programs short and full.

    Args:
        programs: Programs without splits.
        resident: Programs that the machine runs at once.
        most_shares: Pages or strips that the splits of a program share out.
        share_tokens: Tokens in one of them.
        most_splits: Bound on the number.
    """
    most = max(1, min(_MOST_SPLITS, most_shares, most_splits))

    def cost(splits: int) -> int:
        tokens = -(-most_shares // splits) * share_tokens
        return -(-programs * splits // resident) * (tokens + _SPLIT_TOKENS)

    costs = [cost(splits) for splits in range(1, most + 1)]
    good_enough = _GOOD_ENOUGH * min(costs)
    return 1 + next(i for i, each in enumerate(costs) if each <= good_enough)
