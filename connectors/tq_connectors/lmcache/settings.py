"""What an operator writes in LMCache's JSON for us, checked when LMCache starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tq_connectors.engine_settings import engine_preset, read_engine_settings
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError
from tq_store.settings import COUNT, SIZE, TEXT, about

UNCODED = "none"
SERDE_PREFIX = "serde:"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How LMCache's objects go into tq-store; each field's meaning is its `help`.

    LMCache's keys hold a model's name and hashes of tokens, nothing that tells two kinds of bytes apart. So
    the first three have no default: they are part of every key, and a change of one is another cache.
    """

    revision: str = field(
        metadata=about(TEXT, "which weights: a commit, a digest, whatever changes with them")
    )
    kv_dtype: str = field(metadata=about(TEXT, "dtype of keys and values in the model, e.g. bfloat16"))
    codec: str = field(
        metadata=about(
            TEXT, "what the bytes are: none, serde:PRESET, or PRESET where the engine's pages are ours"
        )
    )
    salt: str = field(default="", metadata=about(TEXT, "keeps apart what only you know to differ"))
    capacity_bytes: int = field(
        default=0, metadata=about(SIZE, "what LMCache may fill before its eviction starts; 0 is no limit")
    )
    load_threads: int = field(default=2, metadata=about(COUNT, "loads at once"))
    store_threads: int = field(default=1, metadata=about(COUNT, "stores at once"))
    max_pending_tasks: int = field(
        default=1024, metadata=about(COUNT, "tasks of one kind waiting or running; one more fails at once")
    )

    def __post_init__(self) -> None:
        for name in ("revision", "kv_dtype"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; without it two different caches would share keys")
        if self.codec != UNCODED:
            try:
                engine_preset(self.codec.removeprefix(SERDE_PREFIX))
            except ValueError as error:
                raise ConfigError(f"codec is {self.codec!r}: {error}, or {UNCODED}") from error
        for name in ("load_threads", "store_threads", "max_pending_tasks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def read_settings(
    written: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[StoreSettings, ClientConfig]:
    """Ours, and those of the connection, from the JSON object that LMCache hands over.

    Raises:
        ConfigError: A setting is missing, unknown, not understood or not allowed; the message names it.
    """
    return read_engine_settings(StoreSettings, written, environment)
