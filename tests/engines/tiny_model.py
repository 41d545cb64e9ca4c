"""A Llama of two layers with random weights, whose tokens depend on all of their prompt."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, MIDDLE, LAYERS, HEADS, KV_HEADS = 512, 128, 256, 2, 4, 2


def save_tiny_model(directory: Path, *, head_dim: int = 32) -> Path:
    """Write it as a Hugging Face folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HEADS * head_dim, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * head_dim),
            f"{prefix}.mlp.gate_proj.weight": (MIDDLE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (MIDDLE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, MIDDLE),
        }
    generator = torch.Generator().manual_seed(3)
    weights = {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in _NORMS]
    weights |= {f"{name}.weight": torch.ones(HIDDEN) for name in (*norms, "model.norm")}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


_NORMS = ("input", "post_attention")
