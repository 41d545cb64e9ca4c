"""How a launch of the dequantize kernel cuts its pages up: a pure function of their number and shape."""

from dataclasses import dataclass

from tq_kernels._page_shape import PageShape

_PAGES_OF_A_PRODUCT = 4
"""Pages that a program rotates back, so that it reads the rotation once for several pages."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How a launch cuts its pages up.

    Args:
        variant: ``"copy"`` where nothing is rotated back, ``"product"`` where a matrix product does it.
        programs: Programs a KV head and side.
        pages: Pages a program works on, one after the other.
        num_warps: Warps a program.
    """

    variant: str
    programs: int
    pages: int
    num_warps: int


def plan_dequantize(num_pages: int, shape: PageShape, *, rotated: bool) -> LaunchPlan:
    """The plan for a number of pages; it depends on nothing else that a launch brings."""
    num_warps = 8 if shape.page_tokens * shape.tile_dim > 8192 else 4
    if rotated or not (shape.key_rotated or shape.value_rotated):
        return LaunchPlan("copy", num_pages, 1, num_warps)
    pages = _PAGES_OF_A_PRODUCT
    return LaunchPlan("product", -(-num_pages // pages), pages, num_warps)
