"""Before and after the Hopper split kernel: queries into columns, splits and raw sinks into outputs.

A rotation is two rounds of signs and a Hadamard matrix, which a warp does in registers and by exchanging
lanes: no matrix is read. Channels lie in a warp in order, VEC = head_dim / 32 of them in a thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tq_kernels.device.hopper_operands import let_next_begin, log2, wait_for_launch_before


@gluon.jit
def _exchange(x, mask):
    """The same register of the lane whose number differs in the bits of the mask."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=r,r,r", [x, mask], gl.float32, False, 1
    )


@gluon.jit
def _within_thread(x, LOW: gl.constexpr, R: gl.constexpr, D: gl.constexpr):
    """One step of the transform over a bit of the channels of a thread; LOW channels lie below that bit."""
    x = gl.permute(gl.reshape(x, [R, D // (2 * LOW), 2, LOW]), (0, 1, 3, 2))
    a, b = gl.split(x)
    return gl.reshape(gl.permute(gl.join(a + b, a - b), (0, 1, 3, 2)), [R, D])


@gluon.jit
def _hadamard(x, R: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Hadamard matrix of order D times every row of x: [R, D], a row a warp."""
    VEC: gl.constexpr = D // 32
    lane = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, L)) // VEC, 0)
    for bit in gl.static_range(5):
        sign = gl.where((lane >> bit) & 1 == 1, -1.0, 1.0)
        x = x * sign + _exchange(x, 1 << bit)
    if VEC >= 2:
        x = _within_thread(x, 1, R, D)
    if VEC >= 4:
        x = _within_thread(x, 2, R, D)
    if VEC >= 8:
        x = _within_thread(x, 4, R, D)
    return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def rotate_columns(
    x, signs_first, signs_second, VEC: gl.constexpr, N: gl.constexpr, D: gl.constexpr, L: gl.constexpr
):
    """Columns [N, D] rotated, D times as long. Four threads hold one, 4 * VEC channels in a row each."""
    x = _hadamard_of_four(x * gl.expand_dims(signs_first, 0), VEC, N, D, L)
    return _hadamard_of_four(x * gl.expand_dims(signs_second, 0), VEC, N, D, L)


@gluon.jit
def _hadamard_of_four(x, VEC: gl.constexpr, N: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Hadamard matrix of order D times every row of x: [N, D], a row in four neighbouring threads."""
    lane = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, L)) // (4 * VEC), 0)
    for bit in gl.static_range(2):
        sign = gl.where((lane >> bit) & 1 == 1, -1.0, 1.0)
        x = x * sign + _exchange(x, 1 << bit)
    for bit in gl.static_range(8):
        if (1 << bit) < D and ((1 << bit) < 4 * VEC or (1 << bit) >= 16 * VEC):
            x = _within_thread(x, 1 << bit, N, D)
    return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def prepare_columns(
    p_query,
    p_balance,
    p_signs,
    p_prepared,
    num_kv_heads,
    factor,
    query_seq_stride,
    query_row_stride,
    query_head_stride,
    GROUP: gl.constexpr,
    COLUMNS: gl.constexpr,
    PADDED: gl.constexpr,
    D: gl.constexpr,
    R: gl.constexpr,
):
    """R columns of a KV head of a sequence, rotated; grid (PADDED / R, KV heads, sequences)."""
    L: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [R, 1], [1, 0])
    # pages too are complete from here on, so that the next launch may read them before it waits for this one
    wait_for_launch_before()
    let_next_begin()
    i_head = gl.program_id(1).to(gl.int64)
    i_seq = gl.program_id(2).to(gl.int64)
    o_c = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, L))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    row = (o_c // GROUP).to(gl.int64) * query_row_stride + (i_head * GROUP + o_c % GROUP) * query_head_stride
    p_q = p_query + i_seq * query_seq_stride + gl.expand_dims(row, 1) + gl.expand_dims(o_d, 0)
    x = gl.load(p_q, mask=gl.expand_dims(o_c < COLUMNS, 1), other=0.0).to(gl.float32)
    if p_balance is not None:
        x = x * gl.expand_dims(gl.load(p_balance + i_head * D + o_d), 0)
    x = _hadamard(x * gl.expand_dims(gl.load(p_signs + o_d), 0), R, D, L)
    x = _hadamard(x * gl.expand_dims(gl.load(p_signs + D + o_d), 0), R, D, L) * factor
    p_out = p_prepared + ((i_seq * num_kv_heads + i_head) * PADDED + gl.expand_dims(o_c, 1)) * D
    gl.store(p_out + gl.expand_dims(o_d, 0), x.to(gl.float16))


@gluon.jit(do_not_specialize=["num_columns", "num_splits", "lse_seq_stride", "lse_row_stride", "window"])
def merge_columns(
    p_partial,
    p_partial_lse,
    p_query,
    p_sink_keys,
    p_sink_values,
    p_sink_rows,
    p_lengths,
    p_positions,
    p_signs,
    p_out,
    p_lse,
    num_kv_heads,
    num_columns,
    num_splits,
    query_seq_stride,
    query_row_stride,
    query_head_stride,
    sink_seq_stride,
    sink_token_stride,
    sink_head_stride,
    out_seq_stride,
    out_row_stride,
    out_head_stride,
    lse_seq_stride,
    lse_row_stride,
    lse_head_stride,
    score_factor,
    cap_log2,
    window,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    W: gl.constexpr,
    U: gl.constexpr,
    SINKS: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):
    """A column of a sequence and KV head, W warps sharing the splits; grid (columns, KV heads, sequences).

    A split that saw nothing has a log-sum-exp of -inf, in base 2, and nothing else of it is used.
    `p_sink_rows` says where each sequence has its sinks, negative nowhere; without it, in its own place.
    """
    VEC: gl.constexpr = D // 32
    L_SPLITS: gl.constexpr = gl.BlockedLayout([U, VEC], [1, 32], [W, 1], [1, 0])
    L_WARPS: gl.constexpr = gl.BlockedLayout([1, VEC], [1, 32], [W, 1], [1, 0])
    L_ROW: gl.constexpr = gl.BlockedLayout([1, VEC], [1, 32], [1, W], [1, 0])
    L: gl.constexpr = gl.SliceLayout(0, L_ROW)
    column = gl.program_id(0)
    i_head = gl.program_id(1).to(gl.int64)
    i_seq = gl.program_id(2).to(gl.int64)
    i_row = (column // GROUP).to(gl.int64)
    i_query_head = i_head * GROUP + column % GROUP
    o_d = gl.arange(0, D, layout=L)
    o_split = gl.arange(0, W * U, layout=gl.SliceLayout(1, L_SPLITS))
    o_channel = gl.arange(0, D, layout=gl.SliceLayout(0, L_SPLITS))
    b_second = gl.load(p_signs + o_d)
    b_first = gl.load(p_signs + D + o_d)
    wait_for_launch_before()
    let_next_begin()

    b_max = gl.full([W], -1e30, gl.float32, layout=gl.SliceLayout(1, L_WARPS))
    b_sum = gl.zeros([W], gl.float32, layout=gl.SliceLayout(1, L_WARPS))
    b_out = gl.zeros([W, D], gl.float32, layout=L_WARPS)
    row0 = (i_seq * num_kv_heads + i_head) * num_splits
    for start in range(0, num_splits, W * U):
        m_split = start + o_split < num_splits
        row = (row0 + start + o_split) * num_columns + column
        b_lse = gl.load(p_partial_lse + row, mask=m_split, other=-float("inf"))
        p_part = p_partial + gl.expand_dims(row * D, 1) + gl.expand_dims(o_channel, 0)
        b_part = gl.load(p_part, mask=gl.expand_dims(m_split, 1), other=0.0)
        b_part = gl.where(gl.expand_dims(b_lse, 1) == -float("inf"), 0.0, b_part)
        b_lse = gl.reshape(b_lse, [W, U])
        b_next = gl.convert_layout(gl.max(b_lse, axis=1), gl.SliceLayout(1, L_WARPS))
        b_next = gl.maximum(b_max, b_next)
        b_fade = gl.exp2(b_max - b_next)
        b_max = b_next
        b_weight = gl.exp2(
            b_lse - gl.expand_dims(gl.convert_layout(b_next, gl.SliceLayout(1, b_lse.type.layout)), 1)
        )
        b_sum = b_sum * b_fade + gl.convert_layout(gl.sum(b_weight, axis=1), gl.SliceLayout(1, L_WARPS))
        b_part = b_part * gl.expand_dims(
            gl.convert_layout(gl.reshape(b_weight, [W * U]), gl.SliceLayout(1, L_SPLITS)), 1
        )
        b_part = gl.sum(gl.reshape(b_part, [W, U, D]), axis=1)
        b_out = b_out * gl.expand_dims(b_fade, 1) + gl.convert_layout(b_part, L_WARPS)

    b_best = gl.max(b_max, axis=0)
    b_weight = gl.exp2(b_max - b_best)
    b_total = gl.sum(b_sum * b_weight, axis=0)
    # every warp does the same from here on
    x = gl.convert_layout(gl.sum(b_out * gl.expand_dims(b_weight, 1), axis=0), L, assert_trivial=True)
    x = _hadamard(gl.expand_dims(x, 0), 1, D, L_ROW) * gl.expand_dims(b_first, 0)
    x = _hadamard(x, 1, D, L_ROW) * gl.expand_dims(b_second * (1.0 / D), 0)
    x = gl.convert_layout(gl.reshape(x, [D]), L, assert_trivial=True)
    i_sinks = i_seq
    if p_sink_rows is not None:
        i_sinks = gl.load(p_sink_rows + i_seq).to(gl.int64)
    for i_sink in gl.static_range(SINKS):
        # raw token i_sink of the sequence
        position = gl.load(p_lengths + i_seq) - 1
        if p_positions is not None:
            position = gl.load(p_positions + i_seq)
        position = position - (num_columns // GROUP - 1) + i_row
        o_sink = gl.maximum(i_sinks, 0) * sink_seq_stride + i_head * sink_head_stride
        o_sink += gl.to_tensor(i_sink).to(gl.int64) * sink_token_stride
        p_q = p_query + i_seq * query_seq_stride + i_row * query_row_stride + i_query_head * query_head_stride
        b_key = gl.load(p_sink_keys + o_sink + o_d).to(gl.float32)
        score = gl.sum(gl.load(p_q + o_d).to(gl.float32) * b_key, axis=0) * score_factor
        if SOFTCAP:
            score = cap_log2 * (1.0 - 2.0 / (gl.exp2(score * 2.8853900817779268) + 1.0))
        seen = (i_sink <= position) & (i_sinks >= 0)
        if WINDOW:
            seen = seen & (i_sink > position - window)
        score = gl.where(seen, score, -float("inf"))
        best = gl.maximum(b_best, score)
        fade = gl.exp2(b_best - best)
        weight = gl.exp2(score - best)
        b_best = best
        b_total = b_total * fade + weight
        # a sink that the sequence has not reached may hold anything
        b_value = gl.load(p_sink_values + o_sink + o_d).to(gl.float32)
        x = x * fade + gl.where(seen, b_value, 0.0) * weight

    some = b_total > 0
    x = x / gl.where(some, b_total, 1.0)
    p_o = p_out + i_seq * out_seq_stride + i_row * out_row_stride + i_query_head * out_head_stride
    gl.store(p_o + o_d, x.to(p_out.dtype.element_ty))
    total = gl.where(some, (b_best + log2(b_total)) * 0.6931471805599453, -float("inf"))
    p_l = p_lse + i_seq * lse_seq_stride + i_row * lse_row_stride + i_query_head * lse_head_stride
    gl.store(p_l, total)
