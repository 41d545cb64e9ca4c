"""How extend attention is cut for a machine: a pure function of shapes."""

from dataclasses import dataclass
from typing import Literal

from tq_kernels.decode_plan import (
    MAX_ROWS,
    DecodePlan,
    Machine,
    merge_columns,
    num_splits,
    padded_columns,
    plan_decode,
)
from tq_kernels.layout import PageLayout

WORKSPACE_TOKENS = 16384
"""Tokens of the prefix that are inflated at once, by default."""

_MOST_DECODE_COLUMNS = 64
_FEWEST_INFLATED_COLUMNS = 1024
_FEWEST_INFLATED_TOKENS = 4096
"""Below either, reading pages for every tile of columns costs less than inflating them once."""

_FEWEST_HALF_COLUMNS = 8192
"""From here on partial results weigh more than their last bits."""

Variant = Literal["decode", "direct", "inflate"]
Library = Literal["cpu", "flash", "cudnn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendPlan:
    """How an extend is cut. A column is a new token and a query head of one KV head.

    Args:
        variant: How the prefix is read. "decode": by the split kernel of decode attention; "direct": by a
            kernel with queries on the wide side, unpacking pages for every tile of columns; "inflate": by a
            library over runs of the prefix in half precision. Nobody reads a prefix without tokens.
        columns: New tokens times query heads a KV head.
        padded_columns: Columns of the prepared query.
        decode: Plan of the split kernel; for "decode" only.
        num_splits: Parts of the prefix that are attended to apart.
        tile_columns: Columns of a program that reads the prefix directly.
        tile_tokens: Tokens that it holds at once.
        num_warps: Its warps.
        run_tokens: Tokens that are inflated at once.
        library: Whose attention runs over inflated tokens.
        raw_columns: Columns of a program over raw tokens.
        raw_tokens: Tokens that it holds at once.
        raw_warps: Its warps.
        merge_columns: Columns of a program that merges.
        half_partials: Whether partial results are in float16; else in float32.
    """

    variant: Variant
    columns: int
    padded_columns: int
    decode: DecodePlan | None
    num_splits: int
    tile_columns: int
    tile_tokens: int
    num_warps: int
    run_tokens: int
    library: Library
    raw_columns: int
    raw_tokens: int
    raw_warps: int
    merge_columns: int
    half_partials: bool


def plan_extend(
    layout: PageLayout,
    machine: Machine,
    *,
    num_new: int,
    num_query_heads: int,
    prefix_len: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    workspace_tokens: int = WORKSPACE_TOKENS,
    raw_bytes: int = 2,
    variant: Variant | None = None,
) -> ExtendPlan:
    """The plan for num_new queries over a prefix, or the best one of a variant that the caller wants.

    Raw numbers have raw_bytes each; those of 4 do not run on tensor cores.

    Raises:
        ValueError: "inflate" with a window or a cap, which libraries do not know; "decode" for more rows than
            it takes.
    """
    heads = layout.num_kv_heads
    columns = num_new * num_query_heads // heads
    masked = sliding_window is not None or softcap is not None
    if variant is None:
        variant = _choose(machine, num_new, columns, prefix_len, masked)
    if variant == "inflate" and masked:
        raise ValueError("a prefix is not inflated for a sliding window or a soft cap")
    if variant == "decode" and num_new > MAX_ROWS:
        raise ValueError(f"the decode path takes up to {MAX_ROWS} rows, not {num_new}")
    seen = prefix_len if sliding_window is None else min(prefix_len, sliding_window + num_new)
    pages = -(-seen // layout.page_tokens)
    decode = None
    if variant == "decode":
        decode = plan_decode(
            layout, machine, num_seqs=1, num_query_heads=num_query_heads, max_pages=pages, rows=num_new
        )
    tile_columns, tile_tokens, num_warps = _tile(layout, columns)
    resident = machine.num_processors * (8 // num_warps)
    splits = num_splits(-(-columns // tile_columns) * heads, resident, pages, layout.page_tokens)
    run_pages = max(1, min(workspace_tokens, prefix_len) // layout.page_tokens)
    raw_columns, raw_tokens, raw_warps = _raw_tile(layout, columns, raw_bytes)
    return ExtendPlan(
        variant=variant,
        columns=columns,
        padded_columns=padded_columns(columns),
        decode=decode,
        num_splits=decode.num_splits if decode else splits if variant == "direct" else 1,
        tile_columns=tile_columns,
        tile_tokens=tile_tokens,
        num_warps=num_warps,
        run_tokens=run_pages * layout.page_tokens,
        library=_library(machine, layout.head_dim),
        raw_columns=raw_columns,
        raw_tokens=raw_tokens,
        raw_warps=raw_warps,
        merge_columns=merge_columns(columns, heads, machine),
        half_partials=variant == "direct" and columns >= _FEWEST_HALF_COLUMNS,
    )


def _choose(machine: Machine, num_new: int, columns: int, prefix_len: int, masked: bool) -> Variant:
    if columns <= _MOST_DECODE_COLUMNS and num_new <= MAX_ROWS:
        return "decode"
    long = columns >= _FEWEST_INFLATED_COLUMNS and prefix_len >= _FEWEST_INFLATED_TOKENS
    return "inflate" if long and not masked and machine.capability is not None else "direct"


def _library(machine: Machine, head_dim: int) -> Library:
    if machine.capability is None:
        return "cpu"
    return "cudnn" if machine.capability[0] == 9 and head_dim in (64, 128) else "flash"


def _tile(layout: PageLayout, columns: int) -> tuple[int, int, int]:
    """Columns, tokens and warps of a program over pages, such that its tiles fit in registers."""
    wide = layout.head_dim > 128
    tokens = min(layout.page_tokens, 32 if wide else 64)
    if wide or columns <= 64:
        return 64, tokens, 8 if wide else 4
    return 128, tokens, 8


def _raw_tile(layout: PageLayout, columns: int, raw_bytes: int) -> tuple[int, int, int]:
    """Columns, tokens and warps of a program over raw tokens."""
    wide = layout.head_dim > 128
    if raw_bytes > 2:
        return 32, 16 if wide else 32, 4
    if wide or columns <= 64:
        return 64, 32 if wide else 64, 8 if wide else 4
    return 128, 64, 8
