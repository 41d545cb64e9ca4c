"""The codec state that an engine starts with: a file that `tq-store calibrate --save` wrote, or none."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tq_connectors.codec_state import CodecState, read_state
from tq_kernels.layout import PageLayout
from tq_store.errors import BlockFormatError, ConfigError

STATE_VARIABLE = "TQ_CONNECTORS_STATE"
"""Names the file. It is read by every process of an engine, so that all make the same pages."""

_LARGEST_FILE_BYTES = 64 << 20


def load_state(environment: Mapping[str, str]) -> CodecState | None:
    """The state that the environment names; None where it names none.

    Raises:
        ConfigError: The file cannot be read, or holds no state.
    """
    name = environment.get(STATE_VARIABLE)
    if not name:
        return None
    try:
        with Path(name).open("rb") as file:
            return read_state(file.read(_LARGEST_FILE_BYTES))
    except (OSError, BlockFormatError) as error:
        raise ConfigError(
            f"{STATE_VARIABLE} is {name}, which cannot be used: {error}; "
            "`tq-store calibrate --save FILE` writes one"
        ) from error


def balance_of_layer(
    state: CodecState, layer: int, *, num_layers: int, first_kv_head: int, num_kv_heads: int, head_dim: int
) -> torch.Tensor:
    """What a process divides the keys of a layer by.

    Args:
        state: Of the whole model.
        layer: Counted from 0 over the whole model.
        num_layers: Attention layers of the whole model.
        first_kv_head: First KV head of the process.
        num_kv_heads: KV heads of the process.
        head_dim: Channels of a key.

    Returns:
        ``[num_kv_heads, head_dim]`` float32 on the CPU.

    Raises:
        ConfigError: The state is of another model.
    """
    layers, heads, channels = state.key_balance.shape
    if (layers, channels) != (num_layers, head_dim) or first_kv_head + num_kv_heads > heads:
        asked = first_kv_head + num_kv_heads
        raise ConfigError(
            f"the codec state is of {layers} layers, {heads} KV heads and {channels} channels, "
            f"this model has {num_layers}, {asked} or more and {head_dim}"
        )
    return state.key_balance[layer, first_kv_head : first_kv_head + num_kv_heads].clone()


def balances_of_layers(
    state: CodecState,
    layout: PageLayout,
    layers: Sequence[int],
    *,
    num_model_layers: int,
    total_kv_heads: int,
    tp_rank: int,
    tp_size: int,
) -> list[torch.Tensor]:
    """What a rank divides the keys of its layers by: ``[num_kv_heads, head_dim]`` float32 each, on the CPU.

    Args:
        state: Of the whole model.
        layout: Of the pages: the KV heads of this rank.
        layers: Counted from 0 over the whole model.
        num_model_layers: Attention layers of the whole model.
        total_kv_heads: KV heads of the whole model.
        tp_rank: Of this process among those that divide the heads.
        tp_size: How many they are; heads are repeated where there are fewer.

    Raises:
        ConfigError: The state is of another model.
    """
    return [
        balance_of_layer(
            state,
            layer,
            num_layers=num_model_layers,
            first_kv_head=tp_rank * total_kv_heads // tp_size,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
        )
        for layer in layers
    ]
