"""Settings of the serde `tq`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tq_connectors.engine_settings import engine_preset
from tq_connectors.lmcache.settings import UNCODED
from tq_kernels import PageLayout
from tq_store.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SerdeSettings:
    """What an operator writes beside ``"type": "tq"``.

    Args:
        preset: A preset, or none to seal bytes as they are: any layout, checksummed, not compressed.
        num_kv_heads: KV heads that one rank holds.
        head_dim: Channels of a head.
        page_tokens: Tokens of a page; a chunk must be whole pages.
        device: ``auto``, ``cpu``, or where Triton's kernels shall run, e.g. ``cuda:0``.
        max_workers: Threads of LMCache's that pack and unpack.

    Raises:
        ConfigError: A value is not allowed; the message names it.
    """

    preset: str
    num_kv_heads: int = 0
    head_dim: int = 0
    page_tokens: int = 64
    device: str = "auto"
    max_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_workers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"serde setting {name} must be an integer of at least 1, not {value!r}")
        if self.preset != UNCODED:
            self.page_layout()

    def page_layout(self) -> PageLayout:
        """Layout of the pages."""
        for name in ("num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"serde setting {name} must be an integer of at least 1, not {value!r}: "
                    "a chunk of LMCache's does not tell its heads"
                )
        try:
            return PageLayout(
                spec=engine_preset(self.preset),
                head_dim=self.head_dim,
                num_kv_heads=self.num_kv_heads,
                page_tokens=self.page_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"serde: {error}") from error

    def codec_device(self) -> torch.device:
        """Where packing runs."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"serde setting device: {error}") from error


def read_serde_settings(written: Mapping[str, Any]) -> SerdeSettings:
    """Settings from LMCache's JSON.

    Raises:
        ConfigError: A setting is missing, unknown or not allowed; the message names it.
    """
    try:
        return SerdeSettings(**written)
    except TypeError as error:
        raise ConfigError(f"serde: {str(error).partition('() ')[2]}") from error
