"""Compiled kernels: launched again without asking Triton anew what they are, or compiled many at once.

Triton finds the compiled kernel of a call by the value of every constant, layouts and tables among them. That
takes 100 us and more of Python for one launch, four of which make a layer's decode: more than the GPU needs
where no CUDA graph holds them. Here a call is known by what it may differ in.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import torch

from tq_kernels._dispatch import is_interpreted

_OPTIONS = frozenset(("num_warps", "num_stages", "maxnreg", "launch_pdl"))
_LARGEST_INT32 = (1 << 31) - 1
_IS_AMD = torch.version.hip is not None
_MOST_COMPILERS = 16
"""Threads; Triton reads a kernel's Python on one of them at a time, a fifth of its work."""

_only_compiles: ContextVar[bool] = ContextVar("_only_compiles", default=False)

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
    if _only_compiles.get():
        function.warmup(grid=grid, **arguments, **(fixed or {}))
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


def compile_ahead(launches: Callable[[], None]) -> None:
    """Compile the kernels that a function launches, several at once, and launch none of them.

    What they would have written holds anything. One that does not compile is left to its first launch.
    """
    copy_context().run(_compile, launches)  # Triton's mode ends with the context, whatever happens


def _compile(launches: Callable[[], None]) -> None:
    from triton import AsyncCompileMode  # Triton is there on some platforms only

    _only_compiles.set(True)
    threads = min(_MOST_COMPILERS, len(os.sched_getaffinity(0)))
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="tq-compile") as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        launches()


def _kind(value: Any) -> Any:
    """All that the compiler looks at in an argument that is no constant."""
    if isinstance(value, torch.Tensor):
        # AMD's compiler also looks at whether 32 bits reach all of a storage
        small = _IS_AMD and value.untyped_storage().size() <= _LARGEST_INT32
        return value.dtype, value.data_ptr() % 16 == 0, small
    if type(value) is int:
        return value == 1, value % 16 == 0, -_LARGEST_INT32 <= value <= _LARGEST_INT32
    return type(value)
