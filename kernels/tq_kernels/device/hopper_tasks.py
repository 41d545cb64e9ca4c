"""What a program of the Hopper quantize kernel does, one after the other: items, their runs and their turns.

An item is a head of a layer of a window of page_tokens tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tq_kernels.device.hopper_runs import next_run, slots_of_window, whole_page
from tq_kernels.device.hopper_turns import OF_KEYS, OF_VALUES, turns_of_run


@gluon.jit
def task_of(step, num_items):
    """What a program does in a step: an item, or -1, and those of its turns that may be.

    Two programs share an item of the last step where there are enough of them: one has the keys.
    """
    i_program, num_programs = gl.program_id(0), gl.num_programs(0)
    left = num_items - step * num_programs
    item, share = step * num_programs + i_program, step * 0 + (OF_KEYS | OF_VALUES)
    if 2 * left <= num_programs:
        share = gl.where(i_program % 2 == 0, OF_KEYS, OF_VALUES)
        item = gl.where(i_program < 2 * left, step * num_programs + i_program // 2, -1)
    else:
        item = gl.where(i_program < left, item, -1)
    return item, share


@gluon.jit
def window_of(item, num_layers, p_layers, HEADS: gl.constexpr):
    """Window of an item: items are heads of layers of windows."""
    if p_layers is None:
        return item // HEADS
    else:
        return item // HEADS // num_layers


@gluon.jit
def layer_and_head(item, num_layers, p_layers, HEADS: gl.constexpr):
    """Layer and head of an item."""
    if p_layers is None:
        return gl.to_tensor(0).to(gl.int64), (item % HEADS).to(gl.int64)
    else:
        return (item // HEADS % num_layers).to(gl.int64), (item % HEADS).to(gl.int64)


@gluon.jit
def _of_layer(p_vectors, p_layers, i_layer):
    """Vectors of a layer, layers being at offsets that the host has made sure are multiples of 16."""
    if p_layers is not None:
        p_vectors += gl.multiple_of(gl.load(p_layers + i_layer), 16)
    return p_vectors


@gluon.jit
def vectors_of(item, is_key, num_layers, keys, values, HEADS: gl.constexpr):
    """Keys or values of an item, and their strides: of pages of a cache, and of tokens."""
    i_layer, i_head = layer_and_head(gl.maximum(item, 0), num_layers, keys[1], HEADS)
    p_vectors = _of_layer(keys[0], keys[1], i_layer) + i_head * keys[4]
    page_stride, token_stride = keys[2], keys[3]
    if not is_key:
        p_vectors = _of_layer(values[0], values[1], i_layer) + i_head * values[4]
        page_stride, token_stride = values[2], values[3]
    return p_vectors, page_stride, token_stride


@gluon.jit
def advance(
    p_slots,
    ahead,
    step,
    item,
    place,
    num_tokens,
    num_layers,
    num_items,
    p_layers,
    HEADS: gl.constexpr,
    SHAPE: gl.constexpr,
    L_SLOTS: gl.constexpr,
):
    """The next run of the program, and its turns; `ahead` are the slots of the window after this one."""
    P: gl.constexpr = SHAPE.page_tokens
    token = item * 0 - 1
    page, facts, share = token, token, token
    low = token.to(gl.int32 if P == 64 else gl.int64)
    high = low
    while (token < 0) & (item >= 0):
        if place >= P:
            step += 1
            place = place * 0
            item, share = task_of(step, num_items)
            page = whole_page(ahead, P)
            if page >= 0:
                window = window_of(item, num_layers, p_layers, HEADS)
                token = window * P
                facts = token * 0 + (P | (1 << 16))
                low = low * 0 - 1
                high = low
                place = place + P
            item_after, _ = task_of(step + 1, num_items)
            window = window_of(item_after, num_layers, p_layers, HEADS)
            first = gl.where(item_after < 0, -1, window * P)
            ahead = slots_of_window(p_slots, first, num_tokens, P, L_SLOTS)
        if (token < 0) & (item >= 0):
            item, share = task_of(step, num_items)
            window = window_of(item, num_layers, p_layers, HEADS)
            token, place, page, facts, low, high = next_run(
                p_slots, window * P, place, num_tokens, P, L_SLOTS
            )
    turns = share & turns_of_run(facts, low, high, SHAPE)
    return ahead, step, item, place, turns, token, page, facts, low, high
