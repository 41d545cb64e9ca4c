"""What the keys of a process's layers are divided by, from the codec state that an engine starts with."""

import logging
from collections.abc import Mapping

import torch

from tq_connectors.engine.state import STATE_VARIABLE, balances_of_layers, load_state
from tq_kernels.layout import PageLayout

logger = logging.getLogger(__name__)


def key_balance(
    environment: Mapping[str, str],
    layout: PageLayout,
    *,
    layers: range,
    num_model_layers: int,
    total_kv_heads: int,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor | None:
    """``[len(layers), num_kv_heads, head_dim]`` float32 on the CPU, or None without a state.

    Args:
        environment: Usually `os.environ`.
        layout: Of the pages: the KV heads of this process.
        layers: Those of this process, counted from 0 over the whole model.
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
            "tq-store: pages are made without a codec state; %s names one, with which keys err less",
            STATE_VARIABLE,
        )
        return None
    return torch.stack(
        balances_of_layers(
            state,
            layout,
            layers,
            num_model_layers=num_model_layers,
            total_kv_heads=total_kv_heads,
            tp_rank=tp_rank,
            tp_size=tp_size,
        )
    )
