"""What an operator writes for us in vLLM's `kv_connector_extra_config`, checked when the engine starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tq_connectors.engine_settings import engine_preset, read_engine_settings
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError
from tq_store.settings import COUNT, SIZE, TEXT, about

UNCODED = "none"
_CLIENT_DEFAULTS = {"transfer_timeout": "10s"}
"""A request waits for a load no longer than it would take to compute most prefixes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How an engine's cache goes into host memory and tq-store; each field's meaning is its `help`."""

    revision: str = field(
        metadata=about(TEXT, "which weights: a commit, a digest, whatever changes with them")
    )
    preset: str = field(
        default="tq4",
        metadata=about(
            TEXT, "codec of a cache that the engine keeps in bf16; none moves its bytes as they are"
        ),
    )
    model: str = field(default="", metadata=about(TEXT, "name of the model in the store; else the engine's"))
    salt: str = field(default="", metadata=about(TEXT, "keeps apart what only you know to differ"))
    page_tokens: int = field(default=64, metadata=about(COUNT, "tokens in a page of ours: 64 or 128"))
    num_kv_heads: int = field(
        default=0, metadata=about(COUNT, "KV heads of the whole model; 0 reads them from its config.json")
    )
    head_dim: int = field(
        default=0, metadata=about(COUNT, "channels of a head; 0 reads them from the model's config.json")
    )
    staging_bytes: int = field(
        default=32 << 20,
        metadata=about(
            SIZE,
            "device memory of each of four buffers for pages on their way",
        ),
    )
    host_bytes: int = field(
        default=256 << 20,
        metadata=about(SIZE, "TQStoreConnector: host memory for pages on their way, each way"),
    )
    most_ranks: int = field(
        default=0,
        metadata=about(
            COUNT, "TQStoreConnector: tensor-parallel ranks of the widest engine that shares pages; 0 is ours"
        ),
    )
    skip_layers: str = field(
        default="",
        metadata=about(
            TEXT,
            "the offloading connector: layers that --kv-cache-dtype-skip-layers leaves out, as it has them",
        ),
    )
    load_threads: int = field(
        default=4,
        metadata=about(COUNT, "loads from the store at once, and parts of one that are loaded at once"),
    )
    store_threads: int = field(default=1, metadata=about(COUNT, "stores at once"))
    max_pending_tasks: int = field(
        default=1024, metadata=about(COUNT, "loads, and stores, waiting or running; one more fails at once")
    )

    def __post_init__(self) -> None:
        if self.preset != UNCODED:
            try:
                engine_preset(self.preset)
            except ValueError as error:
                raise ConfigError(f"preset is {self.preset!r}: {error}, or {UNCODED}") from error
        for name in (
            "page_tokens",
            "load_threads",
            "store_threads",
            "max_pending_tasks",
            "staging_bytes",
            "host_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def read_settings(
    written: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[StoreSettings, ClientConfig]:
    """Ours, and those of the connection, from the JSON object that vLLM hands over.

    Raises:
        ConfigError: A setting is missing, unknown, not understood or not allowed; the message names it.
    """
    return read_engine_settings(StoreSettings, written, environment, client_defaults=_CLIENT_DEFAULTS)
