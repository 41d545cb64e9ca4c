"""Checks of what kernels assume about their arguments, with one wording for all ops."""

import torch

from tq_kernels.cold_layout import ColdLayout
from tq_kernels.layout import PageLayout

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What keys, values and queries may be."""

_PAGE_STRIDE_MULTIPLE = 16
"""Kernels load 16 bytes at once, so every page begins at a multiple of 16 bytes."""


def check_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    """Pages are rows of bytes of the layout's size, aligned for the widest load.

    Raises:
        ValueError: Another shape or dtype, or rows that kernels cannot read.
    """
    check_page_bytes(pages, layout)
    page_stride, byte_stride = pages.stride()
    if byte_stride != 1 or page_stride % _PAGE_STRIDE_MULTIPLE or pages.data_ptr() % 16:
        raise ValueError(
            "pages must be rows of contiguous bytes that begin at multiples of "
            f"{_PAGE_STRIDE_MULTIPLE} bytes, not strides {pages.stride()} at address {pages.data_ptr():#x}"
        )


def check_page_bytes(pages: torch.Tensor, layout: PageLayout | ColdLayout) -> None:
    """Pages are rows of bytes of the layout's size.

    Raises:
        ValueError: Another shape or dtype.
    """
    if pages.dtype != torch.uint8 or not _fits(pages.shape, (None, layout.page_bytes)):
        raise ValueError(
            f"pages must be [num_pages, {layout.page_bytes}] uint8, not {list(pages.shape)} {pages.dtype}"
        )


def check_tokens(keys: torch.Tensor, values: torch.Tensor, layout: PageLayout | ColdLayout) -> None:
    """Keys and values are whole pages of the layout.

    Raises:
        ValueError: A shape that does not fit; the message says how.
    """
    expected = (layout.num_kv_heads, layout.head_dim)
    if keys.shape != values.shape or keys.dim() != 3 or tuple(keys.shape[1:]) != expected:
        raise ValueError(
            f"keys and values must both be [num_tokens, {expected[0]}, {expected[1]}], "
            f"not {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.shape[0] % layout.page_tokens:
        raise ValueError(f"{keys.shape[0]} tokens are not whole pages of {layout.page_tokens}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    contiguous_dims: int = 1,
) -> None:
    """A tensor has the shape (None for any size), one of the dtypes, the device and dense last dimensions.

    Args:
        name: What the caller calls it.
        tensor: The tensor.
        shape: Expected sizes.
        dtypes: Allowed dtypes.
        device: Where it must be.
        contiguous_dims: So many trailing dimensions must be dense; the strides before them are free.

    Raises:
        ValueError: Anything else; the message names the argument and what was expected.
    """
    sizes = tensor.shape
    if not _fits(sizes, shape) or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be [{wanted}] {kinds}, not {list(sizes)} {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the pages are on {device}")
    strides, dense = tensor.stride(), 1
    for dim in range(-1, -1 - contiguous_dims, -1):
        if strides[dim] != dense and sizes[dim] > 1:
            raise ValueError(
                f"the last {contiguous_dims} dimension(s) of {name} must be contiguous, not strides {strides}"
            )
        dense *= sizes[dim]


def _fits(sizes: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether sizes are those wanted, None standing for any."""
    if sizes == wanted:
        return True
    if len(sizes) != len(wanted):
        return False
    return sizes == tuple([size if want is None else want for size, want in zip(sizes, wanted, strict=True)])
