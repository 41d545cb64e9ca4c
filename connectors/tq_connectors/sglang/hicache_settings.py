"""What an operator writes in SGLang's JSON for the store, checked when the engine starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tq_connectors.engine_settings import engine_preset, read_engine_settings
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError
from tq_store.settings import COUNT, DURATION, SIZE, TEXT, about

UNCODED = "none"
_OF_SGLANG = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)
"""Keys that stand in the same JSON and are read by SGLang itself."""
_CLIENT_DEFAULTS = {"transfer_timeout": "5s"}
"""A request may wait for its get, which is worth nothing once computing the prompt would have been faster."""
_LINKER_DEFAULTS = {"lookup_timeout": "200ms"}
"""SGLang's scheduler makes the linker's lookups, and does nothing else meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSettings:
    """How SGLang's pages go into the store; each field's meaning is its `help`.

    SGLang's keys hold hashes of tokens, and neither dtype nor weights. So the first two have no default: they
    are part of every key, and a change of one is another cache.
    """

    revision: str = field(
        metadata=about(TEXT, "which weights: a commit, a digest, whatever changes with them")
    )
    codec: str = field(
        metadata=about(TEXT, "a preset, which also a packed pool must have been made with, or none")
    )
    model: str = field(default="", metadata=about(TEXT, "name of the model; the served name where not set"))
    salt: str = field(default="", metadata=about(TEXT, "keeps apart what only you know to differ"))
    tp_sizes: str = field(
        default="",
        metadata=about(
            TEXT, "tensor-parallel sizes of all replicas that share pages, as 1,2,4; this one's where not set"
        ),
    )
    device: str = field(
        default="auto", metadata=about(TEXT, "where pages are packed: auto, cpu, or for example cuda:0")
    )
    fetch_memory_bytes: int = field(
        default=1 << 30,
        metadata=about(SIZE, "host memory for pages on their way; for the linker, which has no other"),
    )
    load_wait_s: float = field(
        default=0.1,
        metadata=about(
            DURATION, "longest that SGLang's scheduler waits for a request's pages; for the linker"
        ),
    )
    load_threads: int = field(
        default=4,
        metadata=about(COUNT, "runs of pages of one prompt that are loaded at once; for HiCache"),
    )
    staging_bytes: int = field(
        default=64 << 20, metadata=about(SIZE, "most bytes of unpacked pages on their way at once")
    )

    def __post_init__(self) -> None:
        if self.codec != UNCODED:
            try:
                engine_preset(self.codec)
            except ValueError as error:
                raise ConfigError(f"codec is {self.codec!r}: {error}, or {UNCODED}") from error
        for size in self.tp_sizes.split(",") if self.tp_sizes else ():
            if not size.strip().isdecimal() or int(size) < 1:
                raise ConfigError(f"tp_sizes is {self.tp_sizes!r}; write for example 1,2,4")
        if self.load_threads < 1:
            raise ConfigError(f"load_threads is {self.load_threads}; it must be at least 1")
        if self.staging_bytes < 1:
            raise ConfigError("staging is 0 bytes; a page needs some to pass through")

    @property
    def shared_tp_sizes(self) -> frozenset[int]:
        """Tensor-parallel sizes of other replicas."""
        return frozenset(map(int, self.tp_sizes.split(","))) if self.tp_sizes else frozenset()

    def codec_device(self) -> torch.device:
        """Where packing runs.

        Raises:
            ConfigError: There is no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device is {self.device!r}: {error}") from error


def read_settings(
    written: Mapping[str, Any], environment: Mapping[str, str], *, is_linker: bool = False
) -> tuple[PageSettings, ClientConfig]:
    """Ours, and those of the connection, from the JSON object that SGLang hands over.

    Args:
        written: The JSON object.
        environment: Usually `os.environ`.
        is_linker: Whether it is the linker's, which looks up where all requests wait.

    Raises:
        ConfigError: A setting is missing, unknown, not understood or not allowed; the message names it.
    """
    ours = {name: value for name, value in written.items() if name not in _OF_SGLANG}
    defaults = _CLIENT_DEFAULTS | (_LINKER_DEFAULTS if is_linker else {})
    return read_engine_settings(PageSettings, ours, environment, client_defaults=defaults)
