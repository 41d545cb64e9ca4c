"""Arguments are completed before `ServerArgs.__post_init__` resolves them. SGLang 0.5.17."""

from typing import Any

from tq_connectors.sglang.hooks.arguments import complete_arguments
from tq_connectors.sglang.hooks.hook import Hook


def before_post_init(arguments: Any, *_: Any, **__: Any) -> None:
    """Complete arguments as they were given."""
    complete_arguments(arguments)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.__post_init__",
    kind="before",
    function=before_post_init,
    parameters=("self",),
)
