"""How one setting is written: its kind of value, its names in file, command line and environment."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

ENVIRONMENT_PREFIX = "TQ_STORE_"

_SIZE_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40} | {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_DURATION_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def format_size(num_bytes: int) -> str:
    """A size in the largest unit that leaves a number of at least 1."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def format_rate(bytes_per_s: float) -> str:
    """A throughput, in the units of sizes."""
    return f"{format_size(round(bytes_per_s))}/s"


def format_ratio(ratio: float | None) -> str:
    """A share as a percentage; a dash where it is not known."""
    return "-" if ratio is None else f"{ratio:.1%}"


def format_duration(seconds: float) -> str:
    """A time in its two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = int(seconds)
    parts: list[str] = []
    for unit, size in units:
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a setting's value looks like in text, and how it is read.

    Args:
        metavar: Shown in help, e.g. ``SIZE``.
        example: Shown when a value is not understood.
        parse: From text, or from a TOML value, to the value; raises ValueError.
        show: From the value to text that `parse` takes.
    """

    metavar: str
    example: str
    parse: Callable[[Any], Any]
    show: Callable[[Any], str] = str


def _parse_quantity(value: Any, units: Mapping[str, float], *, fold: Callable[[str], str]) -> float:
    if isinstance(value, bool):
        raise ValueError("a truth value is no quantity")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if not match or fold(match[2]) not in units:
        raise ValueError("not a number with a unit")
    quantity = float(match[1]) * units[fold(match[2])]
    if not math.isfinite(quantity):
        raise ValueError("more digits than a number has")
    return quantity


def _parse_size(value: Any) -> int:
    return int(_parse_quantity(value, _SIZE_UNITS, fold=str.upper))


def _parse_duration(value: Any) -> float:
    return _parse_quantity(value, _DURATION_UNITS, fold=str.lower)


def _parse_count(value: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError("not a whole number")
    return int(value)


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("not text")
    return value


def _parse_path(value: Any) -> Path:
    try:
        return Path(_parse_text(value)).expanduser()
    except RuntimeError as error:  # ~name, of somebody who is not known here
        raise ValueError("no such home directory") from error


def _parse_switch(value: Any) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    except KeyError as error:
        raise ValueError("neither true nor false") from error


SIZE = Kind(metavar="SIZE", example="4GiB", parse=_parse_size, show=format_size)
DURATION = Kind(metavar="SECONDS", example="30 or 500ms", parse=_parse_duration, show="{:g}".format)
COUNT = Kind(metavar="N", example="64", parse=_parse_count)
TEXT = Kind(metavar="TEXT", example="127.0.0.1:7437", parse=_parse_text)
PATH = Kind(metavar="PATH", example="/var/lib/tq-store", parse=_parse_path)
SWITCH = Kind(metavar="", example="true", parse=_parse_switch)


def choice(*values: str) -> Kind:
    """One of these words."""

    def parse(value: Any) -> str:
        if value not in values:
            raise ValueError(f"none of {values}")
        return str(value)

    return Kind(metavar="|".join(values), example=" or ".join(values), parse=parse)


def about(kind: Kind, text: str, metavar: str | None = None) -> dict[str, Any]:
    """Metadata that makes a dataclass field a setting.

    Args:
        kind: How its value is written.
        text: Its help.
        metavar: Shown in place of the kind's own.
    """
    return {"kind": kind, "help": text, "metavar": metavar or kind.metavar}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as users meet it.

    Args:
        name: Its name in the file; flag and variable follow from it.
        field_name: Its name in the config object.
    """

    name: str
    field_name: str
    kind: Kind
    metavar: str
    help: str
    default: Any

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def shown_default(self) -> str:
        """Its default in text; empty where it is off by default."""
        return "" if self.default in (None, False) else self.kind.show(self.default)


def settings(config_type: type[Any]) -> dict[str, Setting]:
    """All settings of a config class by name, in the order of declaration.

    A name is the field's name without its unit, because a written value brings its own.
    """
    return {setting.name: setting for setting in map(_setting, fields(config_type))}


def _setting(declared: Field[Any]) -> Setting:
    return Setting(
        name=re.sub(r"_(bytes|s)$", "", declared.name),
        field_name=declared.name,
        kind=declared.metadata["kind"],
        metavar=declared.metadata["metavar"],
        help=declared.metadata["help"],
        default=declared.default,
    )
