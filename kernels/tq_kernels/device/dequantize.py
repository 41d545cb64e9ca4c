"""The dequantize kernel: some pages of one KV head and one side, keys or values, to rows of a cache."""

import triton
import triton.language as tl

from tq_kernels.device.levels import byte_tables
from tq_kernels.device.rotate_back import (
    columns_of_part,
    load_center,
    load_tile,
    rotate_keys,
    rotate_values,
    tile_tokens,
)
from tq_kernels.device.write_rows import rows, write_keys, write_values


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


@triton.jit
def _rotate_pages(
    p_pages,
    p_indices,
    p_cache,
    p_slots,
    p_balance,
    p_rotation,
    first_page,
    num_pages,
    page_stride,
    cache_page_stride,
    token_stride,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Tile after tile, each read while the one before is multiplied, and its page's number one earlier."""
    P: tl.constexpr = SHAPE.page_tokens
    TILES: tl.constexpr = P // MODE.rows
    num_tiles = tl.minimum(num_pages - first_page, MODE.pages) * TILES
    p_indices += first_page
    p_slots += first_page.to(tl.int64) * P
    page = tl.load(p_indices)
    following = tl.load(p_indices + tl.minimum(1, num_tiles - 1) // TILES)
    tile = load_tile(p_pages + page.to(tl.int64) * page_stride, 0, KEYS, SHAPE, MODE)
    b_rotation = _rotation(p_rotation, SHAPE)
    for i_tile in range(num_tiles):
        p_section = p_pages + following.to(tl.int64) * page_stride
        next_tile = load_tile(p_section, tl.minimum(i_tile + 1, num_tiles - 1) % TILES, KEYS, SHAPE, MODE)
        p_section = p_pages + page.to(tl.int64) * page_stride
        o_token = tile_tokens(i_tile % TILES, KEYS, SHAPE, MODE)
        p_scales = p_section + (SHAPE.key_scales if KEYS else SHAPE.value_scales)
        scales = tl.load(p_scales.to(tl.pointer_type(tl.float16)) + o_token)
        o_row, m_row = rows(
            p_slots, i_tile // TILES * P + o_token, cache_page_stride, token_stride, MODE.cache_tokens
        )
        p_rows = p_cache + o_row
        if KEYS:
            center = 0.0
            if SHAPE.centered:
                center = load_center(p_section, SHAPE)
            tables = byte_tables(page >> 31, SHAPE.key_code)
            rotate_keys(tile, scales, center, p_rows, m_row, p_balance, b_rotation, tables, SHAPE, MODE)
        else:
            tables = byte_tables(page >> 31, SHAPE.value_code)
            rotate_values(tile, scales, p_rows, m_row, b_rotation, tables, SHAPE, MODE)
        page = following
        following = tl.load(p_indices + tl.minimum(i_tile + 2, num_tiles - 1) // TILES)
        tile = next_tile


@triton.jit
def _write_pages(
    p_pages,
    p_indices,
    p_cache,
    p_slots,
    p_balance,
    first_page,
    num_pages,
    page_stride,
    cache_page_stride,
    token_stride,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Page after page as it was packed; a page's number is read while the one before is written."""
    following = tl.load(p_indices + first_page)
    for i_step in range(MODE.pages):
        i_page = first_page + i_step
        page = following
        following = tl.load(p_indices + tl.minimum(i_page + 1, num_pages - 1))
        if i_page < num_pages:
            p_section = p_pages + page.to(tl.int64) * page_stride
            p_page_slots = p_slots + i_page.to(tl.int64) * SHAPE.page_tokens
            if KEYS:
                tables = byte_tables(page >> 31, SHAPE.key_code)
                write_keys(
                    p_section,
                    p_cache,
                    p_page_slots,
                    p_balance,
                    cache_page_stride,
                    token_stride,
                    tables,
                    SHAPE,
                    MODE,
                )
            else:
                tables = byte_tables(page >> 31, SHAPE.value_code)
                write_values(
                    p_section, p_cache, p_page_slots, cache_page_stride, token_stride, tables, SHAPE, MODE
                )


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
        if MODE.rotate_keys:
            _rotate_pages(
                p_pages,
                p_indices,
                p_key_cache,
                p_slots,
                p_balance,
                p_key_rotation,
                first_page,
                num_pages,
                page_stride,
                key_page_stride,
                key_token_stride,
                True,
                SHAPE,
                MODE,
            )
        else:
            _write_pages(
                p_pages,
                p_indices,
                p_key_cache,
                p_slots,
                p_balance,
                first_page,
                num_pages,
                page_stride,
                key_page_stride,
                key_token_stride,
                True,
                SHAPE,
                MODE,
            )
    else:
        if p_value_layers is not None:
            p_value_cache += tl.multiple_of(tl.load(p_value_layers + i_layer), 16)
        p_value_cache += i_head * value_head_stride
        if MODE.rotate_values:
            _rotate_pages(
                p_pages,
                p_indices,
                p_value_cache,
                p_slots,
                None,
                p_value_rotation,
                first_page,
                num_pages,
                page_stride,
                value_page_stride,
                value_token_stride,
                False,
                SHAPE,
                MODE,
            )
        else:
            _write_pages(
                p_pages,
                p_indices,
                p_value_cache,
                p_slots,
                None,
                first_page,
                num_pages,
                page_stride,
                value_page_stride,
                value_token_stride,
                False,
                SHAPE,
                MODE,
            )
