"""What engines are timed on: Llama-3.1-8B with fewer layers and weights that mean nothing, and prompts."""

import random
from typing import Any


def model_config(layers: int) -> dict[str, Any]:
    """Its `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }


def prompts_of(number: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of so many tokens that share nothing."""
    numbers = random.Random(seed)
    return [[numbers.randrange(10, 31000) for _ in range(length)] for _ in range(number)]
