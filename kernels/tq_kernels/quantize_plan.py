"""How a launch of the quantize kernel cuts its tokens up: a pure function of their number and their pages."""

from dataclasses import dataclass

from tq_kernels._page_shape import PageShape

LARGEST_APPEND = 512
"""Tokens up to which every token has a program to itself: decode batches, and chunks too short to matter."""
_SMALLEST_ROWS = 16
"""Tokens of the smallest tile; every page has as many."""
_WINDOW = 32
_PROGRAM_TOKENS = 256
"""Tokens that a program of whole pages looks at, so that it reads the rotation once for several pages."""
_LARGEST_TILE = 8192
"""Elements of a tile that four warps hold."""
_LARGEST_WIDTH = 128
"""Channels up to which four warps hold the rotation."""
_MAX_REGISTERS = 128
"""With these, four programs of four warps share a multiprocessor and hide each other's loads."""
_APPEND_WARPS = 2
"""The fastest of those that were timed; `benchmarks/NOTES.md` has the times."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How a launch cuts its tokens up.

    Args:
        variant: ``"append"`` for few tokens, ``"pages"`` for many, ``"hopper"`` for tokens of as many pages
            on such a machine, ``"hopper_pages"`` for many there.
        programs: Programs a KV head; of "hopper_pages" as many as fit the machine take that many windows.
        windows: Windows a program looks at, one after the other.
        window: Tokens in a window, each of which may lead a run.
        rows: Tokens of a page that are rotated and packed at once.
        num_warps: Warps a program.
        search: Whether every vector tries all of `cells.SIZES`. "append" does not: a decode step would
            wait for the search.
        max_registers: Registers a thread on NVIDIA, so that more programs share a multiprocessor, or None.
    """

    variant: str
    programs: int
    windows: int
    window: int
    rows: int
    num_warps: int
    search: bool
    max_registers: int | None


def plan_quantize(
    num_tokens: int,
    shape: PageShape,
    *,
    wide: bool = False,
    hopper: bool = False,
    hopper_pages: bool = False,
    whole: bool = False,
) -> LaunchPlan:
    """The plan for a number of tokens.

    Args:
        num_tokens: Tokens in the launch.
        shape: Of the pages.
        wide: Whether rows are float32 before they are rotated, by their dtype or by a balance.
        hopper: Whether a warp may take a token, as `quantize.hopper_appends` says.
        hopper_pages: Whether many tokens have a kernel of their own, as `quantize.hopper_packs` says.
        whole: Whether these are chunks, however short: what is saved once may take its time.
    """
    if hopper and num_tokens <= LARGEST_APPEND:
        return LaunchPlan(
            variant="hopper",
            programs=2 * num_tokens,
            windows=1,
            window=1,
            rows=1,
            num_warps=1,
            search=True,
            max_registers=None,
        )
    is_broad = shape.tile_dim > _LARGEST_WIDTH
    max_registers = None if wide or is_broad else _MAX_REGISTERS
    if num_tokens <= LARGEST_APPEND and not whole:
        return LaunchPlan(
            variant="append",
            programs=num_tokens,
            windows=1,
            window=1,
            rows=_SMALLEST_ROWS,
            num_warps=8 if is_broad else _APPEND_WARPS,
            search=False,
            max_registers=max_registers,
        )
    if hopper_pages:
        return LaunchPlan(
            variant="hopper_pages",
            programs=-(-num_tokens // shape.page_tokens),
            windows=1,
            window=shape.page_tokens,
            rows=shape.page_tokens,
            num_warps=shape.page_tokens // _SMALLEST_ROWS,
            search=True,
            max_registers=None,
        )
    rows = _SMALLEST_ROWS if wide and is_broad else shape.page_tokens
    window = min(_WINDOW, shape.page_tokens)
    return LaunchPlan(
        variant="pages",
        programs=-(-num_tokens // _PROGRAM_TOKENS),
        windows=_PROGRAM_TOKENS // window,
        window=window,
        rows=rows,
        num_warps=8 if is_broad or rows * shape.tile_dim > _LARGEST_TILE else 4,
        search=True,
        max_registers=max_registers,
    )
