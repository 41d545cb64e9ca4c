"""Decode attention whose loads are already tensor-core fragments: the split kernel for NVIDIA Hopper.

A program is one warp. It walks over pages strip by strip, a strip being the tokens of four rows of value
words, with words of the next strip on their way. Tokens fill the wide side of `mma.m16n8k16`, queries the
narrow one:

    scores^T [tokens, columns] = keys [tokens, channels] x queries^T
    output^T [channels, columns] += values^T [channels, tokens] x probabilities^T

Both contractions may run in any order, and pages are packed along them, so a thread loads the very words
whose levels its fragments need: nothing passes through shared memory. Probabilities change sides by
`movmatrix`. The reference that keeps exponentials in range is moved only when a probability reaches 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tq_kernels.device.hopper_columns import rotate_columns
from tq_kernels.device.hopper_operands import (
    bits_of_both,
    count,
    key_operand,
    let_next_begin,
    load_centers,
    load_keys,
    load_scales,
    load_values,
    log2,
    pick,
    row_of,
    scales_of_rows,
    scores_of_centers,
    seen,
    share_start,
    spread,
    table,
    transpose_sides,
    value_operand,
    wait_for_launch_before,
)


@gluon.jit(do_not_specialize=["table_stride", "num_splits", "num_sinks", "window"])
def attend_split(
    p_query,
    p_pages,
    p_table,
    p_lengths,
    p_positions,
    p_sink_rows,
    p_balance,
    p_signs,
    p_out,
    p_lse,
    table_stride,
    page_stride,
    query_seq_stride,
    query_row_stride,
    query_head_stride,
    num_splits,
    num_sinks,
    window,
    factor,
    cap_log2,
    KEY: gl.constexpr,
    VALUE: gl.constexpr,
    D: gl.constexpr,
    P: gl.constexpr,
    SECTION: gl.constexpr,
    COLUMNS: gl.constexpr,
    PADDED: gl.constexpr,
    N: gl.constexpr,
    BLOCKS: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    K_WORDS: gl.constexpr,
    K_SIGNS: gl.constexpr,
    V_WORDS: gl.constexpr,
    V_SIGNS: gl.constexpr,
    K_SCALES: gl.constexpr,
    V_SCALES: gl.constexpr,
    CENTER: gl.constexpr,
    HAS_CENTER: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    VEC: gl.constexpr,
    RAW: gl.constexpr,
    K_ASM: gl.constexpr,
    V_ASM: gl.constexpr,
    K_TABLE: gl.constexpr,
    V_TABLE: gl.constexpr,
    L_ACC: gl.constexpr,
    L_KEYS: gl.constexpr,
    L_VALUES: gl.constexpr,
    L_QUERY: gl.constexpr,
    L_CENTERS: gl.constexpr,
    L_OUT: gl.constexpr,
):
    """A share of a KV head's pages for N columns; grid (splits, KV heads times column blocks, sequences).

    Shares differ by at most one strip. Queries are prepared, or RAW.
    A sequence whose entry of `p_sink_rows` is negative has no raw sinks: its pages are read from the start.
    """
    L_A: gl.constexpr = gl.DotOperandLayout(0, L_ACC, 2)
    L_B: gl.constexpr = gl.DotOperandLayout(1, L_ACC, 2)
    K_GROUPS: gl.constexpr = count(K_ASM)
    V_GROUPS: gl.constexpr = count(V_ASM)
    KW: gl.constexpr = D // (4 * K_GROUPS)
    HIGH: gl.constexpr = KW // (4 * VEC)
    STRIPS: gl.constexpr = P // (16 * V_GROUPS)
    RUN: gl.constexpr = P // V_GROUPS
    # a fresh reference leaves this many binary orders of room above the largest probability
    ROOM: gl.constexpr = 6.0
    TWO: gl.constexpr = 0x40000000

    i_split = gl.program_id(0)
    i_head = gl.program_id(1) // BLOCKS
    i_block = gl.program_id(1) % BLOCKS
    i_seq = gl.program_id(2)
    num_heads = gl.num_programs(1) // BLOCKS
    if RAW:
        wait_for_launch_before()
        # they are rotated while the first words are on their way
        o_q = i_block * N + gl.arange(0, N, layout=gl.SliceLayout(1, L_QUERY))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, L_QUERY))
        query_row = (o_q // GROUP).to(gl.int64) * query_row_stride
        query_row += (i_head * GROUP + o_q % GROUP).to(gl.int64) * query_head_stride
        p_raw = p_query + i_seq.to(gl.int64) * query_seq_stride + gl.expand_dims(query_row, 1)
        b_raw = gl.load(p_raw + gl.expand_dims(o_d, 0), mask=gl.expand_dims(o_q < COLUMNS, 1), other=0.0)
        signs_first = gl.load(p_signs + o_d)
        if p_balance is not None:
            signs_first = signs_first * gl.load(p_balance + i_head * D + o_d)
    length = gl.load(p_lengths + i_seq)
    position = length - 1
    if p_positions is not None:
        position = gl.load(p_positions + i_seq)
    end = gl.minimum(length, position + 1)
    first = num_sinks
    if p_sink_rows is not None:
        first = gl.where(gl.load(p_sink_rows + i_seq) < 0, 0, first)
    earliest = position - (ROWS - 1)
    whole_from = first
    if WINDOW:
        first = gl.maximum(first, earliest - window + 1)
        whole_from = gl.maximum(first, position - window + 1)
    whole_to = gl.minimum(end, earliest + 1)
    first_page = first // P
    num_strips = gl.maximum((end + P - 1) // P - first_page, 0) * STRIPS
    start = first_page * STRIPS + share_start(i_split, num_splits, num_strips)
    stop = first_page * STRIPS + share_start(i_split + 1, num_splits, num_strips)
    p_table += i_seq.to(gl.int64) * table_stride
    row0 = i_seq.to(gl.int64) * num_heads + i_head

    # prepared queries in the order in which keys come out of their words
    o_k = gl.arange(0, D, layout=gl.SliceLayout(1, L_B))
    word = ((o_k >> 4) % (HIGH * VEC)) // VEC * (4 * VEC) + ((o_k >> 1) & 3) * VEC + (o_k >> 4) % VEC
    channel = (o_k // (16 * HIGH * VEC)) * (D // K_GROUPS) + 4 * word + ((o_k >> 3) & 1) * 2 + (o_k & 1)
    o_n = i_block * N + gl.arange(0, N, layout=gl.SliceLayout(0, L_B))
    p_q = p_query + row0 * (PADDED * D) + gl.expand_dims(channel, 1) + gl.expand_dims(o_n, 0) * D

    # where a thread's words lie in a section; rows of a product are tokens in the order (c, h, e)
    o_m = gl.arange(0, 16, layout=gl.SliceLayout(1, L_KEYS))
    o_word = gl.arange(0, KW, layout=gl.SliceLayout(0, L_KEYS))
    k_token = (o_m & 1) + ((o_m >> 3) << 1) + (((o_m >> 1) & 3) << 2)
    o_keys = gl.expand_dims(k_token * KW, 1) + gl.expand_dims(o_word, 0)
    o_c = gl.arange(0, 4, layout=gl.SliceLayout(1, L_VALUES))
    o_channel = gl.arange(0, D, layout=gl.SliceLayout(0, L_VALUES))
    o_values = gl.expand_dims(o_c * D, 1) + gl.expand_dims(o_channel, 0)
    o_row = gl.arange(0, 16, layout=gl.SliceLayout(1, L_ACC))
    o_token = (o_row & 1) + ((o_row >> 3) << 1) + (((o_row >> 1) & 3) << 2)
    o_column = i_block * N + gl.arange(0, N, layout=gl.SliceLayout(0, L_ACC))
    o_scale = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    o_scale = (o_scale >> 4) * RUN + (o_scale & 15)

    b_out = gl.zeros([D, N], gl.float32, layout=L_ACC)
    b_reference = gl.full([N], -1e30, gl.float32, layout=gl.SliceLayout(0, L_ACC))
    b_sum = gl.zeros([16, N], gl.float32, layout=L_ACC)
    # pages are there when the grid begins; queries come from the launch before, which may still run
    if start >= stop:
        if not RAW:
            wait_for_launch_before()
        let_next_begin()
    else:
        k_table = table(length, K_TABLE)
        v_table = table(length, V_TABLE)
        p_pages += i_head * SECTION
        p_section = p_pages + gl.load(p_table + start // STRIPS).to(gl.int64) * page_stride
        next_page = gl.load(p_table + gl.minimum(start + 1, stop - 1) // STRIPS).to(gl.int64)
        strip = start % STRIPS
        b_k = load_keys(p_section, strip, o_keys, V_GROUPS, KW, RUN, K_WORDS, K_SIGNS)
        b_factors = load_scales(p_section, strip, o_scale, V_GROUPS, RUN, K_SCALES, V_SCALES)
        b_v = load_values(p_section, strip, o_values, D, V_WORDS, V_SIGNS)
        center_page = start // STRIPS
        last_page = (stop - 1) // STRIPS
        if HAS_CENTER:
            b_centers = load_centers(
                p_pages, p_table, page_stride, center_page, last_page, D, CENTER, L_CENTERS
            )
        if RAW:
            # which also keeps the assembler from rotating before it loads
            let_next_begin()
            signs_second = gl.load(p_signs + D + o_d)
            b_query = rotate_columns(b_raw.to(gl.float32), signs_first, signs_second, VEC, N, D, L_QUERY)
            b_query = gl.reshape((b_query * factor).to(gl.float16), [N, K_GROUPS, HIGH, 4, VEC, 2, 2])
            b_query = gl.reshape(gl.permute(b_query, (1, 2, 4, 5, 3, 6, 0)), [D, N])
            b_query = gl.convert_layout(b_query, L_B, assert_trivial=True)
        else:
            wait_for_launch_before()
            let_next_begin()
            b_query = gl.load(p_q, mask=gl.expand_dims(o_n < PADDED, 0), other=0.0)
        b_base = gl.zeros([16, N], gl.float32, layout=L_ACC)
        if HAS_CENTER:
            b_bases = scores_of_centers(b_centers, b_query, K_GROUPS, HIGH, VEC, D, N, L_A, L_ACC)
        for i_strip in range(start, stop):
            p_ahead = p_pages + next_page * page_stride
            next_page = gl.load(p_table + gl.minimum(i_strip + 2, stop - 1) // STRIPS).to(gl.int64)
            strip_ahead = gl.minimum(i_strip + 1, stop - 1) % STRIPS
            i_page = i_strip // STRIPS
            if HAS_CENTER:
                if i_page - center_page == 16:
                    center_page = i_page
                    b_next = load_centers(
                        p_pages, p_table, page_stride, i_page, last_page, D, CENTER, L_CENTERS
                    )
                    b_bases = scores_of_centers(b_next, b_query, K_GROUPS, HIGH, VEC, D, N, L_A, L_ACC)
                b_base = row_of(b_bases, i_page - center_page, N, L_ACC)
            partial = (i_page * P < whole_from) | ((i_page + 1) * P > whole_to)
            first_token = i_page * P + strip * 16
            b_scores = ()
            b_scales = ()
            b_probabilities = ()
            for g in gl.static_range(V_GROUPS):
                b_keys = key_operand(b_k[0][g], spread(b_k[1][g], KEY), k_table, K_ASM, D, VEC)
                b_keys = gl.convert_layout(b_keys, L_A, assert_trivial=True)
                b_s = mma_v2(b_keys, b_query, gl.zeros([16, N], gl.float32, layout=L_ACC))
                b_s = b_s * scales_of_rows(b_factors[0], o_token, g) + b_base
                if SOFTCAP:
                    # cap * tanh(s / cap) * log2(e); queries are divided by the cap already
                    b_s = cap_log2 * (1.0 - 2.0 / (gl.exp2(b_s * 2.8853900817779268) + 1.0))
                b_scores = b_scores + (b_s,)
                b_scales = b_scales + (scales_of_rows(b_factors[1], o_token, g),)
                b_probabilities = b_probabilities + (gl.exp2(b_s - gl.expand_dims(b_reference, 0)),)
            # one branch for all groups, so that their products overlap
            if partial:
                b_masked = ()
                for g in gl.static_range(V_GROUPS):
                    first_row = first_token + g * RUN
                    m_seen = seen(
                        first_row, o_token, o_column, first, end, position, window, ROWS, GROUP, WINDOW
                    )
                    # slots not written yet may hold anything
                    token = gl.expand_dims(first_row + o_token, 1)
                    b_masked = b_masked + (
                        (
                            gl.where(m_seen, b_scores[g], -float("inf")),
                            gl.where((token >= first) & (token < end), b_scales[g], 0.0),
                            gl.where(m_seen, b_probabilities[g], 0.0),
                        ),
                    )
                b_scores, b_scales, b_probabilities = (), (), ()
                for g in gl.static_range(V_GROUPS):
                    b_scores = b_scores + (b_masked[g][0],)
                    b_scales = b_scales + (b_masked[g][1],)
                    b_probabilities = b_probabilities + (b_masked[g][2],)
            b_weighted = ()
            b_added = gl.zeros([16, N], gl.float32, layout=L_ACC)
            large = gl.zeros([16, N], gl.int32, layout=L_ACC)
            for g in gl.static_range(V_GROUPS):
                weighted = b_probabilities[g] * b_scales[g]
                large = large | weighted.to(gl.int32, bitcast=True)
                b_added += b_probabilities[g]
                b_weighted = b_weighted + (weighted.to(gl.float16),)
            # words of the next strip take the registers of those just used
            b_k = load_keys(p_ahead, strip_ahead, o_keys, V_GROUPS, KW, RUN, K_WORDS, K_SIGNS)
            b_factors = load_scales(p_ahead, strip_ahead, o_scale, V_GROUPS, RUN, K_SCALES, V_SCALES)
            # bit 30 of a float is set from 2 on, and of what is no number
            if (gl.reduce(large, None, bits_of_both) & TWO) != 0:
                b_top = gl.full([16, N], -float("inf"), gl.float32, layout=L_ACC)
                for g in gl.static_range(V_GROUPS):
                    b_top = gl.maximum(b_top, b_scores[g] + gl.maximum(log2(b_scales[g]), -25.0))
                b_best = gl.max(b_top, axis=0) + ROOM
                b_best = gl.maximum(b_reference, b_best)
                b_fade = gl.expand_dims(gl.exp2(b_reference - b_best), 0)
                b_reference = b_best
                b_out = b_out * b_fade
                b_sum = b_sum * b_fade
                b_added = gl.zeros([16, N], gl.float32, layout=L_ACC)
                b_weighted = ()
                for g in gl.static_range(V_GROUPS):
                    probability = gl.exp2(b_scores[g] - gl.expand_dims(b_best, 0))
                    b_added += probability
                    b_weighted = b_weighted + ((probability * b_scales[g]).to(gl.float16),)
            v_signs = spread(b_v[1], VALUE)
            b_sum += b_added
            for g in gl.static_range(V_GROUPS):
                b_values = value_operand(b_v[0], v_signs, v_table, pick(V_ASM, g), D)
                b_values = gl.convert_layout(b_values, L_A, assert_trivial=True)
                b_right = transpose_sides(b_weighted[g], N, L_B)
                b_out = mma_v2(b_values, b_right, b_out)
            b_v = load_values(p_ahead, strip_ahead, o_values, D, V_WORDS, V_SIGNS)
            p_section = p_ahead
            strip = strip_ahead

    # a value of zero may weigh more than floats reach, as nothing moves the reference for it
    b_total = gl.minimum(gl.sum(b_sum, axis=0), 3.0e38)
    m_any = b_total > 0
    b_lse = gl.where(m_any, b_reference + log2(b_total), -float("inf"))
    b_out = b_out * gl.expand_dims(1.0 / gl.where(m_any, b_total, 1.0), 0)
    row = (row0 * num_splits + i_split) * COLUMNS
    gl.store(p_lse + row + o_column, b_lse, mask=o_column < COLUMNS)
    # a thread has four channels after each other
    b_out = gl.permute(gl.reshape(b_out, [D // 32, 4, 8, N]), (3, 0, 2, 1))
    b_out = gl.convert_layout(gl.reshape(b_out, [N, D]), L_OUT)
    o_column = i_block * N + gl.arange(0, N, layout=gl.SliceLayout(1, L_OUT))
    o_channel = gl.arange(0, D, layout=gl.SliceLayout(0, L_OUT))
    p_o = p_out + row * D + gl.expand_dims(o_column * D, 1) + gl.expand_dims(o_channel, 0)
    gl.store(p_o, b_out, mask=gl.expand_dims(o_column < COLUMNS, 1))
