"""Whether our overrides take every call that an engine may make of what they override."""

import importlib
import inspect
import pkgutil
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Override = tuple[type, str, type]
"""One of our classes, the name of a method, and the engine's class that has it too."""


def overrides_in(package: ModuleType, engine: str, *, without: Collection[str] = ()) -> Iterator[Override]:
    """Everything in a package of ours that overrides something of an engine's.

    Args:
        package: Ours.
        engine: Package of the engine.
        without: Modules of ours that this release of the engine is not served with, and cannot import.
    """
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if info.name.rpartition(".")[2] in without:
            continue
        module = importlib.import_module(info.name)
        for ours in vars(module).values():
            if inspect.isclass(ours) and ours.__module__ == info.name:
                yield from _overrides_of(ours, engine)


def _overrides_of(ours: type, engine: str) -> Iterator[Override]:
    bases = [base for base in ours.__mro__ if base.__module__.partition(".")[0] == engine]
    for name, member in vars(ours).items():
        if name == "__init__" and ours.__name__.startswith("_"):
            continue  # nobody but us makes one
        theirs = next((base for base in bases if name in vars(base)), None)
        if theirs is not None and callable(getattr(ours, name)) and not inspect.isclass(member):
            yield ours, name, theirs


def what_differs(ours: type, name: str, theirs: type) -> list[str]:
    """Calls that the engine's method takes and ours does not, each in words."""
    mine, wanted = (_parameters(owner, name) for owner in (ours, theirs))
    takes_any = {parameter.kind for parameter in mine.values()}
    spare_positions = inspect.Parameter.VAR_POSITIONAL in takes_any
    spare_keywords = inspect.Parameter.VAR_KEYWORD in takes_any
    found = []
    my_order = [parameter.name for parameter in mine.values() if parameter.kind in _POSITIONAL]
    for place, parameter in enumerate(each for each in wanted.values() if each.kind in _POSITIONAL):
        if my_order[place : place + 1] != [parameter.name] and not (
            place >= len(my_order) and spare_positions
        ):
            found.append(f"position {place} is {parameter.name}")
    for parameter in wanted.values():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if parameter.name not in mine:
            if not spare_keywords:
                found.append(f"{parameter.name} may be passed by name")
        elif parameter.default is not parameter.empty and mine[parameter.name].default is parameter.empty:
            found.append(f"{parameter.name} may be left out")
    nobody_passes = (
        parameter.name
        for parameter in mine.values()
        if parameter.name not in wanted
        and parameter.default is parameter.empty
        and parameter.kind in _POSITIONAL
    )
    return found + [f"nobody passes {each}" for each in nobody_passes]


def _parameters(owner: type, name: str) -> dict[str, inspect.Parameter]:
    raw: Any = inspect.getattr_static(owner, name)
    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    parameters = dict(inspect.signature(function).parameters)
    if not isinstance(raw, staticmethod):
        parameters.pop(next(iter(parameters)))  # self or cls
    return parameters
