"""Hook: a function of ours on a function of SGLang."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One function of SGLang with ours around it, before it or after it.

    Args:
        target: Dotted path.
        kind: As SGLang's `HookType` has it.
        function: Gets the original first if it is around, and the result if it is after.
        parameters: Of the target that the function relies on, by name.
        is_needed: Whether an engine would be wrong without it, not slower alone.
    """

    target: str
    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    is_needed: bool = True
