"""Arguments are completed before `ServerArgs.resolve_once` resolves and seals them. SGLang 0.5.23."""

from typing import Any

from tq_connectors.sglang.hooks.arguments import complete_arguments
from tq_connectors.sglang.hooks.hook import Hook


def before_resolve_once(arguments: Any) -> None:
    """Complete arguments as they were given; those that are resolved already are sealed."""
    if not getattr(arguments, "_resolution_finished", False):
        complete_arguments(arguments)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.resolve_once",
    kind="before",
    function=before_resolve_once,
    parameters=("self",),
)
