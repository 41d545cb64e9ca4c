"""Names of ours among the choices of `--kv-cache-dtype`, to which SGLang adds none. 0.5.17 to 0.5.23."""

import argparse
from typing import Any

from tq_connectors.engine.layouts import DTYPES
from tq_connectors.sglang.hooks.hook import Hook

OPTION = "--kv-cache-dtype"


def after_add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """Add the names to the option of a parser that SGLang has filled."""
    for action in parser._actions:  # noqa: SLF001  # argparse has no other way to an option
        if OPTION in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, *DTYPES]


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.add_cli_args",
    kind="after",
    function=after_add_cli_args,
    parameters=("parser",),
)
