"""Tiles of a run's rows on Hopper: their way into shared memory, and their product with the rotation."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from tq_kernels.device.hopper_planes import token_of_row
from tq_kernels.device.hopper_runs import index_of_rows
from tq_kernels.device.hopper_tasks import layer_and_head


@gluon.jit
def invert(p_balance, item, is_key, num_layers, p_layers, inverse, HEADS: gl.constexpr, L_LINE: gl.constexpr):
    """What the keys of an item are multiplied by, into shared memory."""
    if is_key:
        i_layer, i_head = layer_and_head(item, num_layers, p_layers, HEADS)
        o_channel = gl.arange(0, inverse.shape[0], layout=L_LINE)
        balance = gl.load(p_balance + (i_layer * HEADS + i_head) * inverse.shape[0] + o_channel)
        inverse.store(gl.div_rn(1.0, balance))


@gluon.jit
def fetch(
    tile,
    vectors,
    p_slots,
    p_sources,
    token,
    facts,
    i_tile,
    num_tokens,
    P: gl.constexpr,
    CACHE_TOKENS: gl.constexpr,
    L_COPY: gl.constexpr,
):
    """Begin to copy rows of a run to shared memory; zeros where it has none.

    Args:
        tile: Shared memory ``[rows, head_dim]``.
        vectors: As `hopper_tasks.vectors_of`.
        p_slots: Slot of every token.
        p_sources: Token of every token in a cache, where there is one.
        token: The run's first.
        facts: Of the run, as `hopper_runs.look_around` has them.
        i_tile: Which tile of the page.
        num_tokens: In p_slots.
        P: Tokens of a page.
        CACHE_TOKENS: Of a page of the cache, or 0.
        L_COPY: How threads copy rows.
    """
    ROWS: gl.constexpr = tile.shape[0]
    p_vectors, page_stride, token_stride = vectors
    o_token = token_of_row(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L_COPY)), P)
    o_column = gl.expand_dims(gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, L_COPY)), 0)
    first = i_tile * (ROWS // 2)
    if (facts & 0xFFFF) == P:
        token += first
        if CACHE_TOKENS == 0:
            p_vectors += token.to(gl.int64) * token_stride
            o_next = o_token.to(gl.uint32) * token_stride.to(gl.uint32)
        else:
            source = gl.load(p_sources + token + o_token)
            o_next = (source // CACHE_TOKENS) * page_stride + (source % CACHE_TOKENS) * token_stride
        async_copy.async_copy_global_to_shared(tile, p_vectors + o_column + gl.expand_dims(o_next, 1))
    else:
        index = index_of_rows(p_slots, token, num_tokens, facts, o_token + first, P)
        if CACHE_TOKENS == 0:
            o_row = (token + gl.maximum(index, 0)).to(gl.int64) * token_stride
        else:
            source = gl.load(p_sources + token + index, mask=index >= 0, other=0)
            o_row = (source // CACHE_TOKENS) * page_stride + (source % CACHE_TOKENS) * token_stride
        m_row = gl.expand_dims(index >= 0, 1)
        p_rows = p_vectors + gl.expand_dims(o_row, 1) + o_column
        async_copy.async_copy_global_to_shared(tile, p_rows, mask=m_row)
    async_copy.commit_group()


@gluon.jit
def rotated(tile, rotation, inverse, is_key, L_ACC: gl.constexpr):
    """The tile's rows times d R, once they have arrived; the product is under way.

    Keys that have a balance, whose inverse is in shared memory, go through the matrix in two parts, which are
    within 2^-17 of them.
    """
    ROWS: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    y = gl.zeros([ROWS, D], gl.float32, layout=L_ACC)
    gl.inline_asm_elementwise("cp.async.wait_all; // $0", "=r", [], gl.int32, False, 1)
    fence_async_shared()
    gl.thread_barrier()
    if inverse is None:
        y = warpgroup_mma(tile, rotation, y, use_acc=False, is_async=True)
    else:
        if is_key:
            L_ROWS: gl.constexpr = gl.DotOperandLayout(0, L_ACC, 2)
            for i in gl.static_range(D // 64):  # parts, for they take many registers
                factor = inverse.slice(64 * i, 64).load(gl.SliceLayout(0, L_ROWS))
                x = tile.slice(64 * i, 64, 1).load(L_ROWS).to(gl.float32) * gl.expand_dims(factor, 0)
                high = x.to(gl.bfloat16)
                low = (x - high.to(gl.float32)).to(gl.bfloat16)
                y = warpgroup_mma(high, rotation.slice(64 * i, 64, 0), y, use_acc=i > 0)
                y = warpgroup_mma(low, rotation.slice(64 * i, 64, 0), y)
        else:
            y = warpgroup_mma(tile, rotation, y, use_acc=False)
    return y
