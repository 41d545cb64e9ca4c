"""Whether SGLang's hashes of pages tell requests with unlike keys and values apart."""

from types import ModuleType
from typing import Any

from tq_store.errors import ConfigError

_SEEDED_HASH = "get_storage_hash_str"
"""What later releases hash pages with; adapter and salt of a request are in it."""


def check_page_hashes(arguments: Any, hashes: ModuleType) -> None:
    """Refuse what would be a wrong hit, here and on every replica that shares the store.

    Args:
        arguments: SGLang's server arguments.
        hashes: Its `mem_cache.utils`.

    Raises:
        ConfigError: LoRA adapters are served, and the release hashes tokens alone.
    """
    if arguments.enable_lora and not hasattr(hashes, _SEEDED_HASH):
        raise ConfigError(
            "the store takes no LoRA adapters with this release of SGLang, whose hashes of pages leave them "
            "out; run a newer one, or without --enable-lora"
        )
