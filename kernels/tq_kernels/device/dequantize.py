"""The dequantize kernel: some pages of one KV head and one side, keys or values, to rows of a cache."""

import triton
import triton.language as tl

from tq_kernels.device.levels import byte_tables
from tq_kernels.device.rotate_back import columns_of_part, rotate_keys, rotate_values
from tq_kernels.device.write_rows import write_keys, write_values


@triton.jit
def _keys(
    p_section,
    p_cache,
    p_slots,
    p_balance,
    b_rotation,
    page_stride,
    token_stride,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    if MODE.rotate_keys:
        for first_token in range(0, SHAPE.page_tokens, MODE.rows):
            rotate_keys(
                p_section,
                p_cache,
                p_slots,
                p_balance,
                b_rotation,
                page_stride,
                token_stride,
                first_token,
                tables,
                SHAPE,
                MODE,
            )
    else:
        write_keys(p_section, p_cache, p_slots, p_balance, page_stride, token_stride, tables, SHAPE, MODE)


@triton.jit
def _values(
    p_section,
    p_cache,
    p_slots,
    b_rotation,
    page_stride,
    token_stride,
    tables,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    if MODE.rotate_values:
        for first_token in range(0, SHAPE.page_tokens, MODE.rows):
            rotate_values(
                p_section,
                p_cache,
                p_slots,
                b_rotation,
                page_stride,
                token_stride,
                first_token,
                tables,
                SHAPE,
                MODE,
            )
    else:
        write_values(p_section, p_cache, p_slots, page_stride, token_stride, tables, SHAPE, MODE)


@triton.jit
def _rotation(p_rotation, SHAPE: tl.constexpr):
    """The matrix in parts, one or two, of so many columns as a product has."""
    PART: tl.constexpr = columns_of_part(SHAPE.tile_dim)
    o_row, o_column = tl.arange(0, SHAPE.tile_dim), tl.arange(0, PART)
    p_first = p_rotation + o_row[:, None] * SHAPE.tile_dim + o_column[None, :]
    first = tl.load(p_first)
    second = first
    if SHAPE.tile_dim > PART:
        second = tl.load(p_first + PART)
    return first, second


# indices may be a row of a table, and are read one at a time
@triton.jit(do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["p_indices"])
def dequantize_sides(
    p_pages,
    p_indices,
    p_key_cache,
    p_value_cache,
    p_key_layers,
    p_value_layers,
    p_slots,
    p_balance,
    p_key_rotation,
    p_value_rotation,
    num_pages,
    num_heads,
    page_layer_stride,
    page_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Some pages of one KV head and layer: keys where the second program number is 0, else values."""
    P: tl.constexpr = SHAPE.page_tokens
    i_head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_page = (tl.program_id(0) // num_heads) * MODE.pages
    i_layer = tl.program_id(2).to(tl.int64)
    p_pages += i_layer * page_layer_stride + i_head * SHAPE.section_bytes
    if tl.program_id(1) == 0:
        if p_key_layers is not None:
            # the host has made sure of it, so that rows are written 16 bytes at a time
            p_key_cache += tl.multiple_of(tl.load(p_key_layers + i_layer), 16)
        p_key_cache += i_head * key_head_stride
        if MODE.balanced:
            p_balance += (i_layer * num_heads + i_head) * SHAPE.head_dim
        b_key_rotation = (0.0, 0.0)
        if MODE.rotate_keys:
            b_key_rotation = _rotation(p_key_rotation, SHAPE)
        following = tl.load(p_indices + first_page)  # a page's number is read while the one before is written
        for i_step in range(MODE.pages):
            i_page = first_page + i_step
            page = following
            following = tl.load(p_indices + tl.minimum(i_page + 1, num_pages - 1))
            if i_page < num_pages:
                _keys(
                    p_pages + page.to(tl.int64) * page_stride,
                    p_key_cache,
                    p_slots + i_page.to(tl.int64) * P,
                    p_balance,
                    b_key_rotation,
                    key_page_stride,
                    key_token_stride,
                    byte_tables(page >> 31, SHAPE.key_code),
                    SHAPE,
                    MODE,
                )
    else:
        if p_value_layers is not None:
            p_value_cache += tl.multiple_of(tl.load(p_value_layers + i_layer), 16)
        p_value_cache += i_head * value_head_stride
        b_value_rotation = (0.0, 0.0)
        if MODE.rotate_values:
            b_value_rotation = _rotation(p_value_rotation, SHAPE)
        following = tl.load(p_indices + first_page)
        for i_step in range(MODE.pages):
            i_page = first_page + i_step
            page = following
            following = tl.load(p_indices + tl.minimum(i_page + 1, num_pages - 1))
            if i_page < num_pages:
                _values(
                    p_pages + page.to(tl.int64) * page_stride,
                    p_value_cache,
                    p_slots + i_page.to(tl.int64) * P,
                    b_value_rotation,
                    value_page_stride,
                    value_token_stride,
                    byte_tables(page >> 31, SHAPE.value_code),
                    SHAPE,
                    MODE,
                )
