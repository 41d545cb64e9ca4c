"""How a launch of the dequantize kernel cuts its pages up: a pure function of their number and shape."""

from dataclasses import dataclass

from tq_kernels._page_shape import PageShape

_PAGES_OF_A_PRODUCT = 4
"""Pages that a program rotates back, so that it reads the rotation once for several pages."""
_ROWS_OF_A_PRODUCT = 64
"""Fewest tokens for which Hopper's tensor cores have an instruction."""
_LARGEST_TILE = 8192
"""Elements of a tile that four warps hold."""
_LARGEST_WIDTH = 128
_MAX_REGISTERS = 128
"""With these, four programs of four warps share a multiprocessor and hide each other's loads."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How a launch cuts its pages up.

    Args:
        variant: ``"copy"`` where nothing is rotated back, ``"product"`` where a matrix product does it.
        programs: Programs a KV head and side.
        pages: Pages a program works on, one after the other.
        rows: Tokens of a page that are rotated back at once.
        num_warps: Warps a program.
        max_registers: Registers a thread on NVIDIA, so that more programs share a multiprocessor, or None.
    """

    variant: str
    programs: int
    pages: int
    rows: int
    num_warps: int
    max_registers: int | None


def plan_dequantize(num_pages: int, shape: PageShape, *, rotated: bool) -> LaunchPlan:
    """The plan for a number of pages; it depends on nothing else that a launch brings."""
    if rotated or not (shape.key_rotated or shape.value_rotated):
        return LaunchPlan("copy", num_pages, 1, shape.page_tokens, _warps(shape.page_tokens, shape), None)
    rows = min(shape.page_tokens, _ROWS_OF_A_PRODUCT)
    return LaunchPlan(
        variant="product",
        programs=-(-num_pages // _PAGES_OF_A_PRODUCT),
        pages=_PAGES_OF_A_PRODUCT,
        rows=rows,
        num_warps=_warps(rows, shape),
        max_registers=_MAX_REGISTERS if shape.tile_dim <= _LARGEST_WIDTH else None,
    )


def _warps(rows: int, shape: PageShape) -> int:
    return 8 if rows * shape.tile_dim > _LARGEST_TILE else 4
