"""Settings that an operator writes in an engine's JSON: a connector's own beside those of the client."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from tq_kernels.spec import CodecSpec, preset
from tq_store.config import ClientConfig, load_config
from tq_store.errors import ConfigError
from tq_store.settings import settings

_Own = TypeVar("_Own")


def read_engine_settings(
    own_type: type[_Own],
    written: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    client_defaults: Mapping[str, Any] | None = None,
) -> tuple[_Own, ClientConfig]:
    """A connector's settings, and those of the connection: every setting of the client may stand beside them.

    Args:
        own_type: A dataclass whose fields are settings; one without a default must be written.
        written: The JSON object that the engine hands over.
        environment: Usually `os.environ`; the client's variables count where the JSON is silent.
        client_defaults: What the client does where JSON and environment are silent.

    Raises:
        ConfigError: A setting is missing, unknown, not understood or not allowed; the message names it.
    """
    own, client = settings(own_type), settings(ClientConfig)
    for name in written.keys() - own.keys() - client.keys():
        (nearest,) = difflib.get_close_matches(name, sorted(own | client), n=1, cutoff=0.0)
        raise ConfigError(f"unknown setting {name!r}; did you mean {nearest!r}?")
    values = {}
    for declared, (name, setting) in zip(fields(own_type), own.items(), strict=True):  # type: ignore[arg-type]
        if name in written:
            try:
                values[setting.field_name] = setting.kind.parse(written[name])
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigError(
                    f"{name}: {written[name]!r} is not understood; write for example {setting.kind.example}"
                ) from error
        elif declared.default is MISSING:
            raise ConfigError(f"{name} is missing: {setting.help}")
    connection = {
        name: value
        for name, value in (client_defaults or {}).items()
        if client[name].variable not in environment
    }
    connection |= {name: value for name, value in written.items() if name in client}
    return own_type(**values), load_config(ClientConfig, arguments=connection, environment=environment)


def engine_preset(name: str) -> CodecSpec:
    """The codec of pages that have one size in all layers, as every engine's pool and chunks have.

    Raises:
        ValueError: A table of presets by layer, or no preset.
    """
    if "+" in name:
        raise ValueError(
            f"{name!r} differs by layer, and an engine's pages have one size in all layers: choose a preset"
        )
    return preset(name)
