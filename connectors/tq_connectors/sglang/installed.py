"""Whether SGLang took our hooks: it skips a hook that it cannot apply, and goes on."""

import inspect
import logging
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from tq_connectors.sglang.hooks import hooks_of_release
from tq_connectors.sglang.hooks.hook import Hook

logger = logging.getLogger(__name__)


@cache
def require_hooks() -> None:
    """Say in one line that every hook took; called in every process that needs them.

    Raises:
        RuntimeError: One that is needed did not, or the function it is on is not the one that we know.
    """
    from sglang.version import __version__

    hooks = hooks_of_release()
    problems = {hook: problem for hook in hooks if (problem := _problem(hook))}
    for hook, problem in problems.items():
        if hook.is_needed:
            raise RuntimeError(
                f"tq-store's plugin does not fit SGLang {__version__}: {hook.target} {problem}"
            )
        logger.warning(
            "tq-store: SGLang %s goes on slower, without a hook: %s %s", __version__, hook.target, problem
        )
    if not problems:
        logger.info("tq-store: all %d hooks took in SGLang %s", len(hooks), __version__)


def _problem(hook: Hook) -> str | None:
    try:
        installed = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return "is not there"
    layers = list(_layers(installed))
    if not any(_holds(layer, hook.function) for layer in layers):
        return "is not hooked; was the plugin loaded?"
    missing = set(hook.parameters) - set(inspect.signature(layers[-1]).parameters)
    return f"has no parameter {', '.join(sorted(missing))}" if missing else None


def _layers(function: Any) -> Iterator[Any]:
    """A function and what it wraps, from the outside in."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _holds(wrapper: Any, function: Any) -> bool:
    """Whether a wrapper that `HookRegistry` made calls the function."""
    cells = wrapper.__closure__ or () if isinstance(wrapper, FunctionType) else ()
    return any(cell.cell_contents is function for cell in cells)
