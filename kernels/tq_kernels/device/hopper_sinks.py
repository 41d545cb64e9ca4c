"""Vectors that are kept as they are besides what is packed of them, on Hopper, a token with all heads."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def next_power(number):
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


@gluon.jit
def _keep(p_vectors, token, strides, p_kept, sink, sink_strides, HEADS: gl.constexpr, D: gl.constexpr):
    """Copy a token's vectors."""
    TILE: gl.constexpr = next_power(HEADS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    o_head = gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT)), 1).to(gl.int64)
    o_channel = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT)), 0)
    p_rows = p_vectors + token.to(gl.int64) * strides[0] + o_head * strides[1] + o_channel
    x = gl.load(p_rows, mask=o_head < HEADS)
    p_rows = p_kept + sink.to(gl.int64) * sink_strides[0] + o_head * sink_strides[1] + o_channel
    gl.store(p_rows, x.to(p_kept.dtype.element_ty), mask=o_head < HEADS)


@gluon.jit
def keep_sinks(
    p_sink_slots,
    p_keys,
    p_values,
    p_sink_keys,
    p_sink_values,
    num_tokens,
    key_strides,
    value_strides,
    sink_strides,
    HEADS: gl.constexpr,
    D: gl.constexpr,
):
    """Copy keys and values of tokens that have a slot to be kept in; every program takes every n-th token."""
    SPAN: gl.constexpr = 4 * 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    first = gl.program_id(0)
    while first < num_tokens:
        o_token = first + gl.arange(0, SPAN, layout=LAYOUT) * gl.num_programs(0)
        m_sink = gl.load(p_sink_slots + o_token, mask=o_token < num_tokens, other=-1) >= 0
        token = gl.min(gl.where(m_sink, o_token, num_tokens))
        while token < num_tokens:
            sink = gl.load(p_sink_slots + token)
            _keep(p_keys, token, key_strides, p_sink_keys, sink, sink_strides, HEADS, D)
            _keep(p_values, token, value_strides, p_sink_values, sink, sink_strides, HEADS, D)
            token = gl.min(gl.where(m_sink & (o_token > token), o_token, num_tokens))
        first += SPAN * gl.num_programs(0)
