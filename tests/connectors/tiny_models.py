"""Small random models of every served type: real transformers code, milliseconds to run."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 101
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 50}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def tiny_model(
    model_type: str = "llama",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    layers: int = 3,
    **changes: Any,
) -> PreTrainedModel:
    """A model with fixed random weights, its attention set to ``"sdpa"``."""
    config_class, model_class, extra = _CLASSES[model_type]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=1.3 * (heads * head_dim) ** -0.5,  # scores of a few units, as in real models
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **(extra | changes),
    )
    torch.manual_seed(1)
    model = model_class(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
