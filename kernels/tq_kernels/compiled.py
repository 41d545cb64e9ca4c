"""Compiled kernels: launched again without asking Triton anew what they are, or compiled many at once.

Triton finds the compiled kernel of a call by the value of every constant, layouts and tables among them. That
takes 100 us and more of Python for one launch, four of which make a layer's decode: more than the GPU needs
where no CUDA graph holds them. Here a call is known by what it may differ in.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch

_OPTIONS = frozenset(("num_warps", "num_stages", "maxnreg", "launch_pdl"))
_LARGEST_INT32 = (1 << 31) - 1
_IS_AMD = torch.version.hip is not None
_MOST_COMPILERS = 16
"""Threads; Triton reads a kernel's Python on one of them at a time, a fifth of its work."""

_only_compiles: ContextVar[bool] = ContextVar("_only_compiles", default=False)


class _Kernel(NamedTuple):
    """What Triton compiled for a call, and what else is needed to call it again.

    Args:
        compiled: Triton's kernel.
        constants: In the order of the parameters.
        fixed: The mapping whose identity is part of the call's key, which so stays alive.
    """

    compiled: Any
    constants: tuple[Any, ...]
    fixed: Mapping[str, Any]


_compiled: dict[tuple[Any, ...], _Kernel] = {}
"""Kernels by their calls."""

_NOTHING: Mapping[str, Any] = {}


def launch(
    function: Any, grid: tuple[int, ...], fixed: Mapping[str, Any] = _NOTHING, /, **arguments: Any
) -> None:
    """Launch a kernel of Triton or Gluon.

    Args:
        function: The decorated function; its parameters are pointers, whose names begin with ``p_``, then
            numbers, then constants, written in capitals.
        grid: Programs, in up to three dimensions.
        fixed: Constants and options of the compiler from a function that returns the same object for the
            same ones; the object, not what is in it, tells calls apart.
        arguments: All others by name, in the order of the parameters: tensors or None, numbers, and what is
            not in `fixed`.
    """
    if not _is_compiled(function.__class__):
        function[grid](**arguments, **fixed)
        return
    if _only_compiles.get():
        function.warmup(grid=grid, **arguments, **fixed)
        return
    site = _site(function.fn, tuple(arguments))
    given = tuple(arguments.values())
    tensors, numbers = given[: site.num_pointers], given[site.num_pointers : site.num_varying]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    device = torch.cuda.current_device()
    key = (
        site,
        id(fixed),
        device,
        _kinds(*numbers),
        *[None if tensor is None else tensor.dtype for tensor in tensors],
        *[address % 16 for address in addresses],
        *given[site.num_varying :],
        *(_small_storages(tensors) if _IS_AMD else ()),
    )
    known = _compiled.get(key)
    if known is None:
        compiled = function[grid](**arguments, **fixed)
        values = {**arguments, **fixed}
        constants = tuple(values[name] for name in function.arg_names[site.num_varying :])
        _compiled[key] = _Kernel(compiled, constants, fixed)
        return
    _run(known.compiled, device, (*grid, 1, 1)[:3], (*addresses, *numbers, *known.constants))


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


@lru_cache(maxsize=8)
def _is_compiled(kind: type) -> bool:
    """Whether functions of a kind are compiled, not interpreted: Triton decides it when it decorates them."""
    from triton.runtime.jit import JITFunction  # Triton is there on some platforms only

    return issubclass(kind, JITFunction)


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """Arguments by the same names of the same function; one object for all such calls.

    Args:
        num_pointers: Those that come first.
        num_varying: Pointers and numbers, which come before all that is constant.
    """

    num_pointers: int
    num_varying: int


@lru_cache(maxsize=256)
def _site(function: FunctionType, names: tuple[str, ...]) -> _Site:
    """The site of a function, as it is without its decorator, and of the names of its arguments.

    Raises:
        ValueError: They are not in the order of the parameters.
    """
    code = function.__code__
    parameters = code.co_varnames[: code.co_argcount]
    num_pointers = sum(name.startswith("p_") for name in names)
    num_varying = sum(not (name.isupper() or name in _OPTIONS) for name in names)
    varying = names[:num_varying]
    if varying != parameters[:num_varying] or not all(name.startswith("p_") for name in names[:num_pointers]):
        raise ValueError(
            f"{function.__name__} takes pointers, numbers and constants as {', '.join(parameters)}; "
            f"given were {', '.join(names)}"
        )
    return _Site(num_pointers, num_varying)


@lru_cache(maxsize=4096, typed=True)
def _kinds(*numbers: float) -> tuple[Any, ...]:
    """All that the compiler looks at in numbers that are no constants."""
    return tuple(
        (number == 1, number % 16 == 0, -_LARGEST_INT32 <= number <= _LARGEST_INT32)
        if type(number) is int
        else type(number)
        for number in numbers
    )


def _small_storages(tensors: tuple[torch.Tensor | None, ...]) -> list[bool]:
    """Whether 32 bits reach all of a tensor's storage, at which AMD's compiler looks too."""
    return [tensor is not None and tensor.untyped_storage().size() <= _LARGEST_INT32 for tensor in tensors]


@lru_cache(maxsize=1)
def _triton() -> tuple[Any, Any]:
    """Where Triton keeps its driver and its hooks."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def _run(compiled: Any, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Launch what Triton compiled, as its `JITFunction.run` ends.

    ``compiled[grid](*arguments)`` does the same, but finds the device again and gathers what hooks of a
    profiler are told, whether or not there are any. Pointers are given as addresses: of every tensor Triton
    would ask the driver whether the device can reach it, which the checks of each op have seen to.
    """
    driver, runtime = _triton()
    if getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True):
        compiled[grid](*arguments)
        return
    stream = driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
