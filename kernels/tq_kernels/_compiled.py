"""launch: run a compiled kernel again without asking Triton anew what it is.

Triton finds the compiled kernel of a call by the value of every constant, layouts and tables among them. That
takes 100 us and more of Python for one launch, four of which make a layer's decode: more than the GPU needs
where no CUDA graph holds them. Here a call is known by what it may differ in.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tq_kernels._dispatch import is_interpreted

_OPTIONS = frozenset(("num_warps", "num_stages", "maxnreg", "launch_pdl"))
_LARGEST_INT32 = (1 << 31) - 1
_IS_AMD = torch.version.hip is not None

_compiled: dict[tuple[Any, ...], tuple[Any, Mapping[str, Any] | None]] = {}
"""Kernels by their calls; each with the mapping whose identity is part of its key, which so stays alive."""


def launch(
    function: Any, grid: tuple[int, ...], fixed: Mapping[str, Any] | None = None, /, **arguments: Any
) -> None:
    """Launch a kernel of Triton or Gluon.

    Args:
        function: The decorated function; its constants are written in capitals.
        grid: Programs, in up to three dimensions.
        fixed: Constants from a function that returns the same object for the same numbers; the object, not
            what is in it, tells calls apart.
        arguments: All others by name, and options of the compiler.
    """
    if is_interpreted():
        function[grid](**arguments, **(fixed or {}))
        return
    key = (
        function,
        id(fixed),
        torch.cuda.current_device(),
        *(value if name.isupper() or name in _OPTIONS else _kind(value) for name, value in arguments.items()),
    )
    known = _compiled.get(key)
    if known is None:
        _compiled[key] = (function[grid](**arguments, **(fixed or {})), fixed)
        return
    given = arguments if fixed is None else arguments | dict(fixed)
    known[0][(*grid, 1, 1)[:3]](*(given[name] for name in function.arg_names))


def _kind(value: Any) -> Any:
    """All that the compiler looks at in an argument that is no constant."""
    if isinstance(value, torch.Tensor):
        # AMD's compiler also looks at whether 32 bits reach all of a storage
        small = _IS_AMD and value.untyped_storage().size() <= _LARGEST_INT32
        return value.dtype, value.data_ptr() % 16 == 0, small
    if type(value) is int:
        return value == 1, value % 16 == 0, -_LARGEST_INT32 <= value <= _LARGEST_INT32
    return type(value)
