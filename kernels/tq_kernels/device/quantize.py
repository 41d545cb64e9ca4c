"""The quantize kernel: from tokens to the bits of their pages, one run of a page and one KV head at a time.

A run is what a launch brings to one page. A program looks at a window of tokens for leaders, the first tokens
of runs; it gathers a run in page order, rotates it with the integer matrix d R, whose products with bfloat16
numbers are exact, and packs it into the page.
"""

import triton
import triton.language as tl

from tq_kernels.cells import NUM_STEPS
from tq_kernels.device.encode import encode, level_tables, saturated_float16
from tq_kernels.device.pack import four
from tq_kernels.device.runs import index_of_rows, look_around, page_of
from tq_kernels.device.write_planes import (
    channel_columns,
    page_rows,
    quad_order,
    store_key_words,
    store_plain,
    store_value_bytes,
    store_value_words,
    tile_of,
)

_NO_TOKEN = tl.constexpr(2**31 - 1)
_NUM_STEPS = tl.constexpr(NUM_STEPS)


@triton.jit
def _rotate(x, b_rotation, PARTS: tl.constexpr):
    """Rows times d R; float32 goes through the matrix in PARTS parts, 0 meaning as it is."""
    if PARTS == 0:
        y = tl.dot(x.to(tl.float32), b_rotation, input_precision="ieee")
    elif PARTS == 1:
        y = tl.dot(x, b_rotation)
    else:
        rest = x.to(tl.float32)
        part = rest.to(b_rotation.dtype)
        y = tl.dot(part, b_rotation)
        for _ in tl.static_range(PARTS - 1):
            rest -= part.to(tl.float32)
            part = rest.to(b_rotation.dtype)
            y = tl.dot(part, b_rotation, y)
    return y


@triton.jit
def _sum_of_rows(y):
    """Sum over the first dimension.

    Eight neighbouring rows of tensor-core results lie in eight threads. To split them makes the compiler
    bring them together, through shared memory, in fewer instructions than sums across threads take.
    """
    COLUMNS: tl.constexpr = y.shape[1]
    y = tl.reshape(y, (y.shape[0] // 16, 2, 8, COLUMNS))
    y = tl.permute(tl.sum(y, axis=1), (0, 2, 1))
    even, odd = tl.split(tl.reshape(y, (y.shape[0], COLUMNS, 2, 2, 2)))
    y0, y1, y2, y3 = four(even)
    y4, y5, y6, y7 = four(odd)
    return tl.sum(((y0 + y1) + (y2 + y3)) + ((y4 + y5) + (y6 + y7)), axis=0)


@triton.jit
def _gather(
    p_vectors,
    b_index,
    stride,
    page_stride,
    p_sources,
    CACHE_TOKENS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Vectors of tokens as rows; zeros where the index is negative and beyond the last channel.

    They lie one after the other or, if CACHE_TOKENS is not 0, in pages of so many, where `p_sources` says.
    """
    o_channel = tl.arange(0, SHAPE.tile_dim)
    m_row = b_index >= 0
    if CACHE_TOKENS == 0:
        # the host has made sure that page_tokens strides fit in 32 bits
        o_row = b_index * stride
    else:
        source = tl.load(p_sources + b_index, mask=m_row, other=0)
        o_row = (source // CACHE_TOKENS) * page_stride + (source % CACHE_TOKENS) * stride
    p_rows = p_vectors + o_row[:, None] + o_channel[None, :]
    return tl.load(p_rows, mask=m_row[:, None] & (o_channel < SHAPE.head_dim)[None, :], other=0.0)


@triton.jit
def _balanced(x, p_balance, SHAPE: tl.constexpr, MODE: tl.constexpr):
    if MODE.balanced:
        o_channel = tl.arange(0, SHAPE.tile_dim)
        balance = tl.load(p_balance + o_channel, mask=o_channel < SHAPE.head_dim, other=1.0)
        x = x.to(tl.float32) * tl.div_rn(1.0, balance)[None, :]
    return x


@triton.jit
def _key_rows(
    p_keys,
    p_balance,
    b_index,
    stride,
    page_stride,
    p_sources,
    b_rotation,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Keys of a tile's tokens; of rotated codes times d R, with columns in `quad_order`."""
    x = _gather(p_keys, b_index, stride, page_stride, p_sources, MODE.cache_tokens, SHAPE)
    x = _balanced(x, p_balance, SHAPE, MODE)
    if SHAPE.key_code <= 8:
        x = quad_order(_rotate(x, b_rotation, MODE.key_parts), SHAPE)
    return x


@triton.jit
def _quantize_tile(
    p_values,
    p_section,
    value_stride,
    value_page_stride,
    p_sources,
    b_rotation,
    b_index,
    b_center,
    y,
    i_tile,
    tables,
    cells,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Write a tile of a run: keys, those of rotated codes given as y, and values."""
    m_row = b_index >= 0
    b_offset = page_rows(i_tile, b_index.shape[0], SHAPE)
    if SHAPE.key_code <= 8:
        if SHAPE.centered:
            y = tl.fma(tl.broadcast_to(b_center.to(tl.float32)[None, :], y.shape), -1.0 * SHAPE.head_dim, y)
        nibbles, signs, scales = encode(
            y, tables[0], cells[0], SHAPE.key_code, False, MODE.search, SHAPE, MODE.ptx
        )
        store_key_words(p_section, nibbles, signs, b_offset, m_row, SHAPE, MODE.ptx)
        p_scales = (p_section + SHAPE.key_scales).to(tl.pointer_type(tl.float16))
        tl.store(p_scales + b_offset, scales, mask=m_row)
    else:
        store_plain(p_section + SHAPE.key_words, y, b_offset, m_row, SHAPE.key_code, False, SHAPE, MODE.ptx)
    x = _gather(p_values, b_index, value_stride, value_page_stride, p_sources, MODE.cache_tokens, SHAPE)
    if SHAPE.value_code <= 8:
        y = quad_order(_rotate(x, b_rotation, MODE.value_parts), SHAPE)
        nibbles, signs, scales = encode(
            y, tables[1], cells[1], SHAPE.value_code, True, MODE.search, SHAPE, MODE.ptx
        )
        if SHAPE.value_code == 8:
            store_value_bytes(p_section, nibbles, b_offset, m_row, SHAPE)
        else:
            store_value_words(p_section, nibbles, signs, m_row, i_tile, SHAPE, MODE.ptx)
        p_scales = (p_section + SHAPE.value_scales).to(tl.pointer_type(tl.float16))
        tl.store(p_scales + b_offset, scales, mask=m_row)
    else:
        store_plain(
            p_section + SHAPE.value_words, x, b_offset, m_row, SHAPE.value_code, True, SHAPE, MODE.ptx
        )


@triton.jit
def _quantize_run(
    p_keys,
    p_values,
    p_slots,
    p_sources,
    p_seeds,
    p_balance,
    p_pages,
    b_rotation,
    num_tokens,
    key_stride,
    key_page_stride,
    value_stride,
    value_page_stride,
    page_stride,
    i_token,
    page,
    b_offset,
    facts,
    cells,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Write the tokens that the launch brings to a page; `p_pages` is at the head's section of page 0."""
    P: tl.constexpr = SHAPE.page_tokens
    ROWS: tl.constexpr = MODE.rows
    TILE_DIM: tl.constexpr = SHAPE.tile_dim
    if MODE.cache_tokens == 0:
        p_keys += i_token.to(tl.int64) * key_stride
        p_values += i_token.to(tl.int64) * value_stride
    p_sources += i_token
    p_section = p_pages + page.to(tl.int64) * page_stride
    count, i_opening = facts & 0xFF, ((facts >> 16) & 0xFF) - 1
    first_offset = (tl.load(p_slots + i_token) % P).to(tl.int32)
    zero = page >> 31
    tables = (level_tables(zero, SHAPE.key_code), level_tables(zero, SHAPE.value_code))
    tokens_of_tiles = 0
    if ROWS == P:
        b_index = index_of_rows(b_offset, first_offset, facts, 0, ROWS, SHAPE)
        y = _key_rows(
            p_keys, p_balance, b_index, key_stride, key_page_stride, p_sources, b_rotation, SHAPE, MODE
        )
    else:
        b_tile = tile_of(tl.maximum(b_offset, 0), ROWS, SHAPE)
        tokens_of_tiles = tl.sum(tl.where(b_offset >= 0, 1, 0).to(tl.int64) << (8 * b_tile).to(tl.int64))
    b_center = 0.0
    if SHAPE.centered:
        o_channel, m_channel = channel_columns(SHAPE)
        source = page
        is_stored = i_opening < 0
        if MODE.seeded:
            seed = tl.load(p_seeds + i_token + tl.maximum(i_opening, 0))
            seeds = (i_opening >= 0) & (seed >= 0) & (count < P)
            source = tl.where(seeds, seed, page)
            is_stored = is_stored | seeds
        p_stored = p_pages + source.to(tl.int64) * page_stride + SHAPE.key_center
        p_stored = p_stored.to(tl.pointer_type(tl.float16)) + o_channel
        stored = tl.load(p_stored, mask=m_channel & is_stored, other=0.0)
        if ROWS == P:
            total = _sum_of_rows(y)
        else:
            total = tl.zeros([TILE_DIM], tl.float32)
            if not is_stored:
                for i_tile in range(P // ROWS):
                    if ((tokens_of_tiles >> (8 * i_tile)) & 0xFF) != 0:
                        b_index = index_of_rows(b_offset, first_offset, facts, i_tile, ROWS, SHAPE)
                        y = _key_rows(
                            p_keys,
                            p_balance,
                            b_index,
                            key_stride,
                            key_page_stride,
                            p_sources,
                            b_rotation,
                            SHAPE,
                            MODE,
                        )
                        total += _sum_of_rows(y)
        mean = saturated_float16(total * tl.div_rn(1.0, (count * SHAPE.head_dim).to(tl.float32)), MODE.ptx)
        b_center = tl.where(is_stored, stored, mean)
        p_center = (p_section + SHAPE.key_center).to(tl.pointer_type(tl.float16))
        tl.store(p_center + o_channel, b_center, mask=m_channel & (i_opening >= 0))
    if SHAPE.section_bytes > SHAPE.used_bytes:
        o_tail = SHAPE.used_bytes // 4 + tl.arange(0, SHAPE.tail_tile)
        m_tail = (o_tail < SHAPE.section_bytes // 4) & (i_opening >= 0)
        tl.store(p_section.to(tl.pointer_type(tl.uint32)) + o_tail, o_tail * 0, mask=m_tail)
    for i_tile in range(P // ROWS):
        if ROWS == P or ((tokens_of_tiles >> (8 * i_tile)) & 0xFF) != 0:
            if ROWS != P:
                b_index = index_of_rows(b_offset, first_offset, facts, i_tile, ROWS, SHAPE)
                y = _key_rows(
                    p_keys,
                    p_balance,
                    b_index,
                    key_stride,
                    key_page_stride,
                    p_sources,
                    b_rotation,
                    SHAPE,
                    MODE,
                )
            _quantize_tile(
                p_values,
                p_section,
                value_stride,
                value_page_stride,
                p_sources,
                b_rotation,
                b_index,
                b_center,
                y,
                i_tile,
                tables,
                cells,
                SHAPE,
                MODE,
            )


@triton.jit
def _keep(p_vectors, b_index, stride, p_kept, o_kept, SHAPE: tl.constexpr):
    """Copy the vectors of tokens as they are; those of the negative in `b_index` are left out."""
    o_channel = tl.arange(0, SHAPE.tile_dim)
    mask = (b_index >= 0)[:, None] & (o_channel < SHAPE.head_dim)[None, :]
    x = _gather(p_vectors, b_index, stride, 0, p_vectors, 0, SHAPE).to(p_kept.dtype.element_ty)
    tl.store(p_kept + o_kept[:, None] + o_channel[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def quantize_runs(
    p_keys,
    p_values,
    p_slots,
    p_sources,
    p_key_layers,
    p_value_layers,
    p_seeds,
    p_balance,
    p_rotation,
    p_cells,
    p_pages,
    p_sink_slots,
    p_sink_keys,
    p_sink_values,
    num_tokens,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    page_layer_stride,
    page_stride,
    sink_token_stride,
    sink_head_stride,
    SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):
    """Write all runs whose leaders stand in the program's windows, for one KV head of one layer."""
    P: tl.constexpr = SHAPE.page_tokens
    WINDOW: tl.constexpr = MODE.window
    i_head = tl.program_id(0).to(tl.int64)
    i_layer = tl.program_id(2).to(tl.int64)
    if MODE.cache_tokens != 0:
        # the host has made sure of it, so that vectors are read 16 bytes at a time
        p_keys += tl.multiple_of(tl.load(p_key_layers + i_layer), 16)
        p_values += tl.multiple_of(tl.load(p_value_layers + i_layer), 16)
    p_keys += i_head * key_head_stride
    p_values += i_head * value_head_stride
    p_pages += i_layer * page_layer_stride + i_head * SHAPE.section_bytes
    if MODE.balanced:
        p_balance += (i_layer * tl.num_programs(0) + i_head) * SHAPE.head_dim
    b_rotation = 0.0
    if SHAPE.key_code <= 8 or SHAPE.value_code <= 8:
        o_side = tl.arange(0, SHAPE.tile_dim)
        b_rotation = tl.load(p_rotation + o_side[:, None] * SHAPE.tile_dim + o_side[None, :])
    cells = (0, 0)
    if MODE.search:
        o_step = tl.arange(0, _NUM_STEPS)
        cells = (tl.load(p_cells + o_step), tl.load(p_cells + _NUM_STEPS + o_step))
    for i_window in range(MODE.windows):
        o_token = (tl.program_id(1) * MODE.windows + i_window) * WINDOW + tl.arange(0, WINDOW)
        m_token = o_token < num_tokens
        if p_sink_slots is not None:
            b_sink = tl.load(p_sink_slots + o_token, mask=m_token, other=-1)
            if tl.max(b_sink) >= 0:
                i_first = tl.min(o_token).to(tl.int64)
                b_index = tl.where(b_sink >= 0, tl.arange(0, WINDOW), -1)
                o_kept = b_sink.to(tl.int64) * sink_token_stride + i_head * sink_head_stride
                p_window = p_keys + i_first * key_token_stride
                _keep(p_window, b_index, key_token_stride, p_sink_keys, o_kept, SHAPE)
                p_window = p_values + i_first * value_token_stride
                _keep(p_window, b_index, value_token_stride, p_sink_values, o_kept, SHAPE)
        b_page = page_of(tl.load(p_slots + o_token, mask=m_token, other=-1), P)
        b_before = page_of(tl.load(p_slots + o_token - 1, mask=m_token & (o_token > 0), other=-1), P)
        m_candidate = (b_page >= 0) & (b_page != b_before)
        i_token = tl.min(tl.where(m_candidate, o_token, _NO_TOKEN))
        while i_token < _NO_TOKEN:
            page = page_of(tl.load(p_slots + i_token), P)
            b_offset, facts = look_around(p_slots, i_token, page, num_tokens, P)
            if (facts >> 24) == 0:
                _quantize_run(
                    p_keys,
                    p_values,
                    p_slots,
                    p_sources,
                    p_seeds,
                    p_balance,
                    p_pages,
                    b_rotation,
                    num_tokens,
                    key_token_stride,
                    key_page_stride,
                    value_token_stride,
                    value_page_stride,
                    page_stride,
                    i_token,
                    page,
                    b_offset,
                    facts,
                    cells,
                    SHAPE,
                    MODE,
                )
            i_token = tl.min(tl.where(m_candidate & (o_token > i_token), o_token, _NO_TOKEN))
