"""Keys and values of a real model on the benchmark's document, without the attention sinks."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_connectors.hf.models import fetch_model

DOCUMENT = Path(__file__).parent / "documents" / "constitution.txt"
NUM_SINKS = 4


def keys_and_values(model_name: str, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, with their rotary embedding, and values: ``[layers, num_tokens, kv_heads, head_dim]`` float32."""
    folder = fetch_model(model_name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(DOCUMENT.read_text(encoding="utf-8"))["input_ids"][: NUM_SINKS + num_tokens]
    with torch.inference_mode():
        layers = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values.layers
    sides = ([getattr(layer, side)[0, :, NUM_SINKS:] for layer in layers] for side in ("keys", "values"))
    keys, values = (torch.stack(side).transpose(1, 2).contiguous().clone() for side in sides)
    return keys, values
