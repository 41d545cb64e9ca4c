"""The attention function that transformers calls: over compressed pages when the cache holds them."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_connectors.hf.cache import layer_of

ATTENTION_NAME = "tq"
_UNSERVED_ARGUMENTS = ("softcap", "s_aux", "head_mask", "position_bias")


def register_attention() -> None:
    """Make ``attn_implementation="tq"`` known to transformers. May be called again."""
    AttentionInterface.register(ATTENTION_NAME, tq_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def tq_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend on the pages of a `TQCache`; with any other cache, do what ``"sdpa"`` does.

    Args:
        module: The model's attention module.
        query: ``[1, num_query_heads, num_new, head_dim]``.
        key: What `TQCache.update` returned: the tokens not yet compressed.
        value: Likewise.
        attention_mask: On pages only checked to be that of one unpadded sequence, in the first layer.
        scaling: Factor on the scores; the inverse root of head_dim by default.
        dropout: Only 0.
        sliding_window: Positions a query sees, or all.
        kwargs: Further options of the model; those that would change the result are refused.

    Returns:
        Output ``[1, num_new, num_query_heads, head_dim]`` and None for the weights.

    Raises:
        ValueError: The model asks for attention that pages do not serve.
    """
    layer = layer_of(key)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unserved = [name for name in _UNSERVED_ARGUMENTS if kwargs.get(name) is not None]
    if dropout or unserved:
        raise ValueError(
            f"attention over compressed pages does not serve {', '.join(unserved or ['dropout'])}; "
            "use another attn_implementation for this model"
        )
    if attention_mask is not None and layer.index == 0 and not _is_causal(attention_mask, sliding_window):
        raise ValueError(
            "attention over compressed pages is causal over one unpadded sequence; pass no padding or mask"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = layer.attend(query[0].transpose(0, 1), softmax_scale=scale, sliding_window=sliding_window)
    layer.finish_pass()
    return output.to(query.dtype)[None], None


def _is_causal(mask: torch.Tensor, sliding_window: int | None) -> bool:
    """Whether ``[1, 1, num_new, num_tokens]`` hides what follows a token or left its window, no more."""
    num_new, num_tokens = mask.shape[-2:]
    last = torch.arange(num_tokens - num_new, num_tokens, device=mask.device)[:, None]
    distance = last - torch.arange(num_tokens, device=mask.device)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return torch.equal((mask if mask.dtype == torch.bool else mask == 0).squeeze((0, 1)), visible)
