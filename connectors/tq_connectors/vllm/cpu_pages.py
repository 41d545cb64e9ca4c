"""How vLLM's CPU backend orders keys and values in a block, learnt from the op that writes them.

Each instruction set has an order of its own, none is documented, and all only move numbers: so a block full
of different numbers tells where each goes. Served: vLLM 0.26 to 0.32.
"""

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tq_connectors.vllm.engine_pages import BlockShape
from tq_store.errors import ConfigError


def cpu_orders(shape: BlockShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Which number, token * head_dim + channel, lies where in the keys and in the values of a head.

    Raises:
        ConfigError: Numbers are not only moved, or there are too many to tell them apart.
    """
    count = shape.block_tokens * shape.head_dim
    if shape.dtype.itemsize != 2 or count > 1 << 16:
        raise ConfigError(f"blocks of {count} numbers of {shape.dtype} are not served on a CPU")
    isa = _get_attn_isa(shape.dtype, shape.block_tokens, shape.head_dim, "auto")
    numbers = torch.arange(count, dtype=torch.int32).to(torch.int16)
    rows = numbers.view(shape.dtype).view(shape.block_tokens, 1, shape.head_dim)
    block = torch.zeros(1, 1, 2 * shape.block_tokens, shape.head_dim, dtype=shape.dtype)
    keys, values = block.chunk(2, dim=2)
    slots = torch.arange(shape.block_tokens)
    ops.cpu_attn_reshape_and_cache(
        rows, rows, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    orders = block.view(torch.int16).view(2, count).long() & 0xFFFF
    if not torch.equal(orders.sort(dim=1).values, torch.arange(count).expand(2, count)):
        raise ConfigError(
            f"vLLM's CPU backend ({isa}) keeps keys and values in another form than it is given"
        )
    return orders[0], orders[1]
