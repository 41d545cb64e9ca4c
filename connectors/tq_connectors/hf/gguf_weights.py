"""Turn one GGUF file of the `llama` or `qwen2` kind into a normal Hugging Face folder, weights in fp32.

fp32 because the file's 4-bit weights are `scale * index + minimum`, which bf16 would round once more; whoever
wants bf16 asks for it when loading. The folder holds nothing that depends on when or where it was made, so
that two machines that convert the same file agree on the digest of its weights.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """How a GGUF architecture differs from the others.

    Args:
        model_class: The transformers class that runs it.
        interleaved_rope: Whether rows of q and k are stored as rotation pairs next to each other, where
            transformers wants all first halves of the pairs before all second halves.
    """

    model_class: str
    interleaved_rope: bool


_ARCHITECTURES = {
    "llama": _Architecture(model_class="LlamaForCausalLM", interleaved_rope=True),
    "qwen2": _Architecture(model_class="Qwen2ForCausalLM", interleaved_rope=False),
}


def convert_gguf(gguf_path: Path, folder: Path, report: Callable[[int, int], None]) -> None:
    """Write config, tokenizer and weights of a GGUF file into a new folder.

    Blocks for seconds. Holds one dequantised tensor at a time, not the model.

    Args:
        gguf_path: The file; its content is trusted, so check its digest first.
        folder: Made here; must not exist.
        report: Called with the weight bytes written so far and in all.

    Raises:
        ValueError: An architecture, a tokenizer or a tensor that this converter does not know.
    """
    reader = gguf.GGUFReader(gguf_path)
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(
            f"{gguf_path.name} is of architecture {architecture!r}; this converter knows {known}"
        )
    config = _config(reader, architecture)
    folder.mkdir()
    _write_tokenizer(reader, folder)
    _write_json(folder / CONFIG_FILE, config)
    special_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special_ids)
    _write_weights(reader, config, _ARCHITECTURES[architecture].interleaved_rope, folder, report)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    """Value of a metadata field.

    Raises:
        ValueError: The file has no such field.
    """
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF file has no field {name!r}, so it cannot be converted")
    return field.contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(reader: gguf.GGUFReader, architecture: str) -> dict[str, Any]:
    """Content of config.json."""

    def value(name: str) -> Any:
        return _field(reader, f"{architecture}.{name}")

    hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
    return {
        "architectures": [_ARCHITECTURES[architecture].model_class],
        "model_type": architecture,
        "dtype": "float32",
        # what this layout follows; transformers doubts the tokenizer of a folder that does not say
        "transformers_version": "5.17.0",
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": hidden_size,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        # stored as fp32: 1e-5 reads back as 9.999999747378752e-06
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Built here because transformers' own reading of a GGUF tokenizer drops the splitting of digits and takes
    the start token for the end token.
    """
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    words: pre_tokenizers.PreTokenizer
    match _field(reader, "tokenizer.ggml.pre"):
        case "smollm":
            words = pre_tokenizers.Digits(individual_digits=True)
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        case "qwen2":
            words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.normalizer = normalizers.NFC()
        case other:
            raise ValueError(f"the GGUF file splits words as {other!r}; this converter knows smollm, qwen2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    for kind, add in (
        (_CONTROL_TOKEN, tokenizer.add_special_tokens),
        (_USER_DEFINED_TOKEN, tokenizer.add_tokens),
    ):
        add([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind])
    tokenizer.save(str(folder / "tokenizer.json"))

    def special(name: str) -> str:
        index: int = _field(reader, f"tokenizer.ggml.{name}_token_id")
        return tokens[index]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, f"{_field(reader, 'general.architecture')}.context_length"),
        "clean_up_tokenization_spaces": False,
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "pad_token": special("padding"),
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _hf_name(name: str) -> str:
    """Name that transformers gives to a GGUF tensor.

    Raises:
        ValueError: A tensor that none of the known architectures has.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    match stem.split("."):
        case ["blk", layer, part] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    raise ValueError(f"the GGUF file has a tensor {name!r} that this converter does not know")


def _split_rope_pairs(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Reorder rows of q or k, per head, from (pair, member) to (member, pair)."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_weights(
    reader: gguf.GGUFReader,
    config: dict[str, Any],
    interleaved_rope: bool,
    folder: Path,
    report: Callable[[int, int], None],
) -> None:
    """Dequantise into a safetensors file: header length, JSON header, tensor after tensor."""
    heads_of = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total_bytes = 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest axis first
        end = total_bytes + 4 * math.prod(shape)
        header[_hf_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [total_bytes, end]}
        total_bytes = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
            part = tensor.name.split(".")[-2]
            if interleaved_rope and part in heads_of:
                values = _split_rope_pairs(values, heads_of[part])
            file.write(np.ascontiguousarray(values).data)
            report(header[_hf_name(tensor.name)]["data_offsets"][1], total_bytes)
