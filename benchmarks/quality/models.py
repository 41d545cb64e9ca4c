"""Load a model to measure: one that is known by name, a Hugging Face folder, or a GGUF file."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.quality.methods.base import Geometry
from tq_connectors.hf.downloads import ConsoleProgress
from tq_connectors.hf.gguf_weights import convert_gguf
from tq_connectors.hf.models import KNOWN_MODELS, default_cache_dir, fetch_model


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Args:
        name: What rows call it.
        source: What `load_model` was asked for.
        folder: Where it was loaded from.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        geometry: Shape of its KV cache.
    """

    name: str
    source: str
    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    geometry: Geometry


def load_model(name_or_path: str, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Fetch or convert if need be, and load.

    Args:
        name_or_path: The beginning of a known name, a Hugging Face folder, or a ``.gguf`` file.
        device: Where the model runs.
        dtype: Of its weights and activations.

    Raises:
        ValueError: Neither of the three, or a GGUF file that transformers cannot read either.
        ModelFetchError: A download failed.
    """
    path, options = Path(name_or_path), {}
    if path.suffix == ".gguf" and path.is_file():
        name, folder = path.stem, path.parent
        try:
            folder = _converted(path)
        except ValueError:  # an architecture that our converter does not know, but transformers may
            options = {"gguf_file": path.name}
    else:
        known = [model.name for model in KNOWN_MODELS if model.name.startswith(name_or_path)]
        name = known[0] if len(known) == 1 else name_or_path
        folder = fetch_model(name)
        name = Path(name).name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    model.to(device)
    config = model.config.get_text_config()
    geometry = Geometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return LoadedModel(
        name=name,
        source=name_or_path,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        geometry=geometry,
    )


def _converted(path: Path) -> Path:
    """Folder that a GGUF file was converted to, in the cache of models, by its digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = default_cache_dir() / f"{path.stem}-{digest[:12]}-gguf"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        with ConsoleProgress() as progress:
            convert_gguf(
                path, staging / "folder", lambda done, total: progress(f"convert {path.name}", done, total)
            )
        (staging / "folder").rename(folder)
    finally:
        shutil.rmtree(staging)
    return folder
