"""What the keys of a group's layers are divided by, from the codec state that an engine starts with."""

import logging
from collections.abc import Mapping, Sequence

import torch

from tq_connectors.engine.state import STATE_VARIABLE, balances_of_layers, load_state
from tq_kernels.layout import PageLayout

logger = logging.getLogger(__name__)


def key_balances(
    environment: Mapping[str, str],
    layout: PageLayout,
    layers: Sequence[int],
    *,
    num_model_layers: int,
    total_kv_heads: int,
    tp_rank: int,
    tp_size: int,
) -> list[torch.Tensor | None]:
    """For each layer ``[num_kv_heads, head_dim]`` float32 on the CPU, or None for keys that stay as they are.

    Args:
        environment: Usually `os.environ`.
        layout: Of the pages: the KV heads of this process.
        layers: Counted from 0 over the whole model; layers of a draft model come after these, and have none.
        num_model_layers: Layers of the whole model.
        total_kv_heads: KV heads of the whole model.
        tp_rank: Of this process among those that divide the heads.
        tp_size: How many they are; heads are repeated where there are fewer.

    Raises:
        ConfigError: The state cannot be read, or is of another model.
    """
    state = load_state(environment)
    if state is None:
        logger.info(
            "tq-store: pages are made without a codec state; %s names one, which halves the error of keys",
            STATE_VARIABLE,
        )
        return [None] * len(layers)
    own = [layer for layer in layers if layer < num_model_layers]
    balances = balances_of_layers(
        state,
        layout,
        own,
        num_model_layers=num_model_layers,
        total_kv_heads=total_kv_heads,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )
    by_layer = dict(zip(own, balances, strict=True))
    return [by_layer.get(layer) for layer in layers]
