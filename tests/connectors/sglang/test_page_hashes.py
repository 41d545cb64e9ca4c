"""Releases of SGLang that hash tokens alone, and those that hash the adapter too."""

from types import ModuleType, SimpleNamespace

import pytest

from tq_connectors.sglang.page_hashes import check_page_hashes
from tq_store.errors import ConfigError

TOKENS_ALONE, SEEDED = ModuleType("utils"), ModuleType("utils")
TOKENS_ALONE.get_hash_str = SEEDED.get_hash_str = None  # type: ignore[attr-defined]
SEEDED.get_storage_hash_str = None  # type: ignore[attr-defined]


def test_adapters_are_refused_where_hashes_leave_them_out() -> None:
    with pytest.raises(ConfigError, match="takes no LoRA adapters with this release"):
        check_page_hashes(SimpleNamespace(enable_lora=True), TOKENS_ALONE)


@pytest.mark.parametrize(
    ("enable_lora", "hashes"), [(None, TOKENS_ALONE), (False, TOKENS_ALONE), (True, SEEDED)]
)
def test_what_hashes_tell_apart_is_served(enable_lora: bool | None, hashes: ModuleType) -> None:
    check_page_hashes(SimpleNamespace(enable_lora=enable_lora), hashes)
