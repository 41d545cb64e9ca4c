"""Commands and settings on a command line: how they are declared, and how settings are found again."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tq_store.config import ClientConfig, ServerConfig
from tq_store.settings import SWITCH, settings

_SETTING = "setting:"
"""Keeps a command's settings apart from its own arguments in the namespace."""


def add_command(commands: Any, name: str, run: Any, text: str, epilog: str) -> argparse.ArgumentParser:
    """A command with a help text, and what runs it; returns its parser."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the tables [server] and [client]"
    )
    return command


def add_settings(command: argparse.ArgumentParser, config_type: type[ServerConfig | ClientConfig]) -> None:
    """One flag per setting. Values stay text, so that they are read as in file and environment."""
    group = command.add_argument_group(
        "settings", "Also read from --config and from TQ_STORE_… variables; a flag beats both."
    )
    for setting in settings(config_type).values():
        default = f" (default: {setting.shown_default})" if setting.shown_default else ""
        shape: dict[str, Any] = {"metavar": setting.metavar}
        if setting.kind is SWITCH:
            shape = {"action": "store_const", "const": True}
        group.add_argument(
            setting.flag,
            dest=_SETTING + setting.name,
            default=argparse.SUPPRESS,
            help=(setting.help + default).replace("%", "%%"),
            **shape,
        )


def given_settings(options: argparse.Namespace) -> Mapping[str, Any]:
    """Settings that were given on the command line; the parser suppresses all others."""
    return {
        name.removeprefix(_SETTING): value
        for name, value in vars(options).items()
        if name.startswith(_SETTING)
    }
