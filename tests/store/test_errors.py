"""The tree drawn in `tq_store.errors` is the tree."""

import re
from types import ModuleType

import pytest

from tq_store import errors

_NODE = re.compile(r"^ {4}(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)", re.MULTILINE)


def drawn_parents(module: ModuleType) -> dict[str, str]:
    """Each class in the drawing with the one it hangs from; the root hangs from Exception."""
    parents: dict[str, str] = {}
    path = ["Exception"]
    for node in _NODE.finditer(module.__doc__ or ""):
        depth = len(node["branch"]) // 4
        assert node["name"] not in parents, f"{node['name']} is drawn twice"
        path = [*path[: depth + 1], node["name"]]
        parents[node["name"]] = path[depth]
    return parents


def defined_classes(module: ModuleType) -> dict[str, type[BaseException]]:
    return {name: value for name, value in vars(module).items() if isinstance(value, type)}


def test_the_drawing_is_the_tree() -> None:
    real = {
        name: ", ".join(base.__name__ for base in kind.__bases__)
        for name, kind in defined_classes(errors).items()
    }

    assert drawn_parents(errors) == real


def test_the_drawing_is_in_the_order_of_the_module() -> None:
    assert list(drawn_parents(errors)) == [
        "TQStoreError",
        "ConfigError",
        *(name for name in defined_classes(errors) if name not in ("TQStoreError", "ConfigError")),
    ]


@pytest.mark.parametrize("kind", defined_classes(errors).values(), ids=lambda kind: kind.__name__)
def test_every_error_says_when_it_happens(kind: type[BaseException]) -> None:
    assert (kind.__doc__ or "").endswith(".")
    assert str(kind("what to do")) == "what to do"


def test_one_except_clause_catches_everything_and_nothing_foreign() -> None:
    for kind in defined_classes(errors).values():
        assert issubclass(kind, errors.TQStoreError)
        # callers must not catch ours by catching a builtin such as ValueError or OSError
        assert kind.__mro__[-3:] == (Exception, BaseException, object)
        assert set(kind.__mro__[:-3]) <= set(defined_classes(errors).values())
