"""The quantize kernel of many tokens for Hopper: of a run and a KV head the keys at once, then the values.

Programs take windows of tokens in turn. The rotation is a product of warpgroups with the integer matrix d R.
While a tile is packed the next one is on its way. Rows of a tile are tokens in the order that lets a warp
hold all that share words of values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from tq_kernels.device.hopper_center import sum_and_center
from tq_kernels.device.hopper_encode import encode, words_of_tokens
from tq_kernels.device.hopper_operands import pick
from tq_kernels.device.hopper_planes import rows_of_tile, store_columns, store_rows, store_scales
from tq_kernels.device.hopper_runs import slots_of_window
from tq_kernels.device.hopper_sinks import keep_sinks
from tq_kernels.device.hopper_tasks import advance, layer_and_head, task_of, vectors_of, window_of
from tq_kernels.device.hopper_tiles import fetch, invert, rotated
from tq_kernels.device.hopper_turns import TILE_ROWS, is_of_keys, next_of, packs, sums, tile_of


@gluon.jit(do_not_specialize=["num_tokens", "num_layers"])
def quantize_windows(
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
    num_layers,
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
    HEADS: gl.constexpr,
    SHAPE: gl.constexpr,
    CODE: gl.constexpr,
    COPIES: gl.constexpr,
    CACHE_TOKENS: gl.constexpr,
    L_WORDS: gl.constexpr,
    L_TOKENS: gl.constexpr,
):
    """Write all runs whose leaders stand in the windows of page_tokens tokens that are the program's.

    The arguments are those of `quantize.quantize_runs`, but for p_rotation, which is d R in the dtype of
    tokens and in the order of columns that `hopper_encode.encode` wants. CODE is (target, range, levels in
    quarters, assembly of a look-up, assembly of a word, assembly of where the table is); COPIES are those of
    the table. L_WORDS is how threads hold words of channels, and L_TOKENS how they hold them to make words of
    tokens of them.
    """
    P: gl.constexpr = SHAPE.page_tokens
    D: gl.constexpr = SHAPE.head_dim
    W: gl.constexpr = D // 8
    WARPS: gl.constexpr = gl.num_warps()
    L_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    L_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    L_ROW: gl.constexpr = gl.SliceLayout(1, L_COPY)
    L_SLOTS: gl.constexpr = gl.BlockedLayout([P // 32], [32], [WARPS], [0])
    L_SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    L_LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    L_TABLE: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    L_TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    L_PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    table = gl.allocate_shared_memory(gl.int32, [256 * COPIES], L_PLAIN)
    rotation = gl.allocate_shared_memory(p_rotation.dtype.element_ty, [D, D], L_TILE)
    tile = gl.allocate_shared_memory(p_keys.dtype.element_ty, [TILE_ROWS, D], L_TILE)
    partial = gl.allocate_shared_memory(gl.float32, [WARPS, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    line = gl.allocate_shared_memory(gl.float32, [D], L_PLAIN)
    if p_balance is None:
        inverse: gl.constexpr = None
    else:
        inverse = gl.allocate_shared_memory(gl.float32, [D], L_PLAIN)

    keys = (p_keys, p_key_layers, key_page_stride, key_token_stride, key_head_stride)
    values = (p_values, p_value_layers, value_page_stride, value_token_stride, value_head_stride)
    num_items = (num_tokens + P - 1) // P * (num_layers * HEADS)
    zero = num_tokens >> 31
    first_item, _ = task_of(zero, num_items)
    window = window_of(first_item, num_layers, p_key_layers, HEADS)
    ahead = slots_of_window(p_slots, gl.where(first_item < 0, -1, window * P), num_tokens, P, L_SLOTS)
    ahead, step, item, place, turns, token, page, facts, low, high = advance(
        p_slots,
        ahead,
        zero - 1,
        zero,
        zero + P,
        num_tokens,
        num_layers,
        num_items,
        p_key_layers,
        HEADS,
        SHAPE,
        L_SLOTS,
    )
    vectors = vectors_of(item, is_of_keys(turns), num_layers, keys, values, HEADS)
    if token >= 0:
        i_tile = tile_of(turns, SHAPE)
        fetch(tile, vectors, p_slots, p_sources, token, facts, i_tile, num_tokens, P, CACHE_TOKENS, L_COPY)
        if p_balance is not None:
            invert(p_balance, item, is_of_keys(turns), num_layers, p_key_layers, inverse, HEADS, L_LINE)

    o_side = gl.expand_dims(gl.arange(0, D, layout=L_ROW), 1)
    o_column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, L_COPY)), 0)
    rotation.store(gl.load(p_rotation + o_side * D + o_column))
    o_cell = (gl.arange(0, 256 * COPIES, layout=L_TABLE) // COPIES + 255) % 256  # as a look-up wants them
    table.store(gl.load(p_cells + o_cell))
    fence_async_shared()
    rotation = rotation.permute((1, 0))
    if p_sink_slots is not None:
        keep_sinks(
            p_sink_slots,
            p_keys,
            p_values,
            p_sink_keys,
            p_sink_values,
            num_tokens,
            (key_token_stride, key_head_stride),
            (value_token_stride, value_head_stride),
            (sink_token_stride, sink_head_stride),
            HEADS,
            D,
        )
    address = gl.inline_asm_elementwise(pick(CODE, 5), "=r", [], gl.int32, True, 1)
    levels = (zero ^ pick(pick(CODE, 2), 0), zero ^ pick(pick(CODE, 2), 1))

    total = gl.zeros([D], gl.float32, layout=gl.SliceLayout(0, L_SUM))
    while token >= 0:
        i_layer, i_head = layer_and_head(item, num_layers, p_key_layers, HEADS)
        p_head = p_pages + i_layer * page_layer_stride + i_head * SHAPE.section_bytes
        turn, is_key, is_whole = next_of(turns), is_of_keys(turns), (facts & 0xFFFF) == P
        y = rotated(tile, rotation, inverse, is_key, L_ACC)
        now_tile, now_token, now_page, now_facts = tile_of(turn, SHAPE), token, page, facts
        now_low, now_high = rows_of_tile(low, high, now_tile, P)
        turns ^= turn
        if turns == 0:
            ahead, step, item, place, turns, token, page, facts, low, high = advance(
                p_slots,
                ahead,
                step,
                item,
                place,
                num_tokens,
                num_layers,
                num_items,
                p_key_layers,
                HEADS,
                SHAPE,
                L_SLOTS,
            )
        vectors = vectors_of(item, is_of_keys(turns), num_layers, keys, values, HEADS)
        y = warpgroup_mma_wait(0, [y])
        gl.thread_barrier()
        if token >= 0:
            i_tile = tile_of(turns, SHAPE)
            fetch(
                tile, vectors, p_slots, p_sources, token, facts, i_tile, num_tokens, P, CACHE_TOKENS, L_COPY
            )
            if p_balance is not None:
                invert(p_balance, item, is_of_keys(turns), num_layers, p_key_layers, inverse, HEADS, L_LINE)
        if SHAPE.centered:
            if sums(turn):
                total = sum_and_center(
                    y,
                    total,
                    turn,
                    partial,
                    line,
                    p_head,
                    page_stride,
                    p_seeds,
                    now_token,
                    now_page,
                    now_facts,
                    SHAPE,
                    L_SUM,
                )
        if P == TILE_ROWS or packs(turn):
            if SHAPE.centered:
                if is_key:
                    y += gl.expand_dims(line.load(gl.SliceLayout(0, L_ACC)), 0)
            words, scales = encode(y, address, levels, CODE)
            p_section = p_head + now_page.to(gl.int64) * page_stride
            p_scales = (
                p_section + gl.where(is_key, SHAPE.key_scales, SHAPE.value_scales) + now_tile * TILE_ROWS
            )
            store_scales(p_scales, scales, now_low, now_high, is_whole, SHAPE)
            words = gl.convert_layout(words, L_WORDS, assert_trivial=True)
            if is_key:
                p_words = p_section + SHAPE.key_words + now_tile * (TILE_ROWS // 4 * D)
                store_rows(p_words, words, now_low, now_high, is_whole, SHAPE)
                if SHAPE.section_bytes > SHAPE.used_bytes:
                    o_tail = gl.arange(0, SHAPE.tail_tile, layout=gl.SliceLayout(0, L_SUM))
                    o_tail += SHAPE.used_bytes // 4
                    m_tail = (o_tail < SHAPE.section_bytes // 4) & ((now_facts >> 16) & 0xFF != 0)
                    gl.store(p_section.to(gl.pointer_type(gl.int32)) + o_tail, o_tail * 0, mask=m_tail)
            else:
                first, second = words_of_tokens(gl.convert_layout(words, L_TOKENS), TILE_ROWS, W)
                p_words = p_section + SHAPE.value_words + now_tile * (TILE_ROWS // 2 * D)
                store_columns(p_words, first, now_low, now_high, is_whole, D, 0)
                store_columns(p_words, second, now_low, now_high, is_whole, D, D // 2)
    table._keep_alive()  # noqa: SLF001  # its readers are assembly, which the allocator does not see
