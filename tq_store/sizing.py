"""How many bytes a model's KV cache takes under each preset, from its config.json; no tensor is needed.

The layout of a page is the business of `tq_kernels`, which this package does not import: the few numbers that
decide its size are repeated here, and a test holds them against the layouts themselves.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_store.block import HEADER_BYTES
from tq_store.errors import ConfigError
from tq_store.layer_table import LayerTable

_ALIGNMENT_BYTES = 128
_STATISTIC_BYTES = 2
_MOST_CONFIG_BYTES = 1 << 20
_MOST_LAYERS = (1 << 16) - 1  # as many as a block can say
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCode:
    """What decides the size of a page.

    Args:
        key_bits: Bits of a key's number.
        value_bits: Bits of a value's number.
        scales: Scales of each token: one for its key, one for its value, or none.
        has_center: Whether a page holds the mean of its keys.
    """

    key_bits: int
    value_bits: int
    scales: int = 2
    has_center: bool = True


PRESETS: Mapping[str, PageCode] = {
    "tq4": PageCode(key_bits=4, value_bits=4),
    "tq3": PageCode(key_bits=3, value_bits=3),
    "tq2": PageCode(key_bits=2, value_bits=2),
    "k8v4": PageCode(key_bits=8, value_bits=4),
    "k4v3": PageCode(key_bits=4, value_bits=3),
    "k4v2": PageCode(key_bits=4, value_bits=2),
    "k3v4": PageCode(key_bits=3, value_bits=4),
    "k3v2": PageCode(key_bits=3, value_bits=2),
    "fp8": PageCode(key_bits=8, value_bits=8, scales=0, has_center=False),
    "raw": PageCode(key_bits=16, value_bits=16, scales=0, has_center=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What of a model decides sizes and times.

    Args:
        num_layers: Attention layers.
        num_heads: Query heads of each.
        num_kv_heads: KV heads of each.
        head_dim: Channels of a key and of a value.
        active_weights: Weights that each token of a prefill is multiplied with; of experts, those it visits.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    active_weights: int


def page_bytes(model: Model, preset: str, page_tokens: int) -> int:
    """A page of one layer, all its KV heads.

    Raises:
        ConfigError: There is no such preset, or no such page.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if page_tokens < 16 or page_tokens % 16:
        raise ConfigError(f"a page has a positive multiple of 16 tokens, not {page_tokens}")
    code = PRESETS[preset]
    numbers = page_tokens * model.head_dim * (code.key_bits + code.value_bits) // 8
    statistics = _STATISTIC_BYTES * (page_tokens * code.scales + model.head_dim * code.has_center)
    alignment = math.lcm(_ALIGNMENT_BYTES, page_tokens)
    return -(-(numbers + statistics) // alignment) * alignment * model.num_kv_heads


def block_sizes(model: Model, codec: str, page_tokens: int) -> tuple[int, ...]:
    """Blocks that hold one page of every layer: one, or of a table by layer one for each run of equal layers.

    Args:
        model: What is cached.
        codec: A preset, or a table as in ``tq3+tq4:0-1,29``.
        page_tokens: Tokens of a page.

    Raises:
        ConfigError: There is no such preset, table, layer or page.
    """
    runs = itertools.groupby(LayerTable.parse(codec).by_layer(model.num_layers))
    return tuple(HEADER_BYTES + len(list(run)) * page_bytes(model, name, page_tokens) for name, run in runs)


def block_bytes(model: Model, codec: str, page_tokens: int) -> int:
    """One page of every layer, with its header or headers."""
    return sum(block_sizes(model, codec, page_tokens))


def read_model(path: Path) -> Model:
    """The model that a Hugging Face ``config.json``, or a folder with one, describes.

    Raises:
        ConfigError: There is none, or it describes a cache that is not keys and values by head.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST_CONFIG_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a model's config.json") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("text_config", content)  # the language part of a model that sees as well
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a model's config.json")
    if "kv_lora_rank" in content:
        raise ConfigError(f"{path} describes multi-head latent attention, which no preset stores")
    try:
        return _model(content)
    except KeyError as error:
        raise ConfigError(f"{path} does not say {error}: it is not a transformer's config.json") from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has a number that makes no sense: {error}") from error


def _model(content: Mapping[str, Any]) -> Model:
    hidden, num_heads = int(content["hidden_size"]), int(content["num_attention_heads"])
    num_kv_heads = int(content.get("num_key_value_heads") or num_heads)
    head_dim = int(content.get("head_dim") or hidden // num_heads)
    num_layers = int(content["num_hidden_layers"])
    if num_layers > _MOST_LAYERS:
        raise ValueError(f"{num_layers} layers")
    kinds = content.get("layer_types") or ["full_attention"] * num_layers
    num_attending = sum(kind in _ATTENTION_LAYERS for kind in kinds)
    if min(hidden, num_heads, num_kv_heads, head_dim, num_attending) < 1:
        raise ValueError("a size below 1")
    attention = 2 * hidden * head_dim * (num_heads + num_kv_heads)
    experts = int(content.get("num_experts_per_tok") or 1)
    width = int(content.get("moe_intermediate_size") or content["intermediate_size"])
    return Model(
        num_layers=num_attending,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        active_weights=num_layers * (attention + 3 * hidden * width * experts),
    )
