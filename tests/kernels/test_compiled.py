"""Kernels are compiled once for calls that the compiler treats alike; for a card that is not here."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

import tq_kernels
from tq_kernels import compiled
from tq_kernels.compiled import launch

_HOPPER = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tq_kernels import PageLayout, _launch, preset
from tq_kernels.compiled import compile_ahead


class Launcher:
    def __init__(self, source, metadata):
        assert metadata.num_warps == 4

    def __call__(self, *arguments):
        launched.append(arguments)


class Hopper:
    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 77)
    launcher_cls = Launcher

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 18})
        load_binary = staticmethod(lambda *_: ("module", "function", 32, 0, 1024))


launched = []
driver.set_active(Hopper())
torch.cuda.current_device = lambda: 0
layout = PageLayout(spec=preset("tq4"), head_dim=64, num_kv_heads=1, page_tokens=64)


def prepare(heads):
    prepared = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    query = torch.ones(1, 1, heads, 64, dtype=torch.bfloat16)
    _launch.launch_prepare(query=query, key_balance=None, prepared=prepared, layout=layout, factor=1.0)
    return prepared



def kernels():
    return list(_launch.prepare_query.device_caches[0][0].values())
"""

_COMPILE = """
def launches():
    for heads in (1, 2, 2, 4):
        assert not prepare(heads).any()  # nothing ran


assert not kernels()
compile_ahead(launches)
print(json.dumps([[kernel.metadata.name, "cubin" in kernel.asm] for kernel in kernels()]))
compile_ahead(launches)  # known now, and launched no more than before
assert not launched
"""

_AGAIN = """
def plain(argument):
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument or 0


query = torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
prepared = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
for _ in range(2):
    _launch.launch_prepare(query=query, key_balance=None, prepared=prepared, layout=layout, factor=1.0)
assert len(kernels()) == 1
for arguments in launched:  # but for hooks and what they are told
    print(json.dumps([plain(each) for each in arguments[:6] + arguments[9:]]))
"""


def _run(program: str, cache: Path) -> list[Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run(
        [sys.executable, "-c", _HOPPER + program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_kernels_are_compiled_and_none_is_launched(tmp_path: Path) -> None:
    assert _run(_COMPILE, tmp_path) == [[["prepare_query", True]] * 3]


def test_a_kernel_is_launched_again_with_what_triton_launched_it_with(tmp_path: Path) -> None:
    first, second = _run(_AGAIN, tmp_path)
    assert first[:5] == [1, 1, 1, 77, "function"]
    assert second == first


class Asked(JITFunction):  # type: ignore[misc, type-arg]
    """A function of which calls are noted, those that Triton is asked about and those that it is not."""

    def __init__(self) -> None:
        def kernel(p_in: Any, p_out: Any, num_rows: int, factor: float, D: int, WIDE: bool) -> None: ...

        self.fn = kernel
        self.arg_names = ["p_in", "p_out", "num_rows", "factor", "D", "WIDE"]
        self.asked: list[dict[str, Any]] = []
        self.again: list[tuple[Any, ...]] = []
        self.hooked: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = "function", "packed"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.asked.append(arguments) or Again(self)


class Again:
    """What Triton returns: a compiled kernel."""

    function, packed_metadata = "function", "packed"

    def __init__(self, asked: Asked) -> None:
        self.run = lambda *arguments: asked.again.append(arguments)
        self._hooked = asked.hooked

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._hooked.append((grid, *arguments))


NUMBERS = torch.arange(64.0)
FIXED = {"D": 64, "num_warps": 4}
CALL = {"p_in": NUMBERS, "p_out": NUMBERS[16:], "num_rows": 48, "factor": 0.5, "WIDE": False}


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Those of a Triton with a driver, and no kernel that was launched before."""
    chains = {name: SimpleNamespace(calls=[]) for name in ("launch_enter_hook", "launch_exit_hook")}
    hooks = SimpleNamespace(**chains)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 70 + device))
    monkeypatch.setattr(compiled, "_triton", lambda: (driver, hooks))
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return hooks


def test_triton_is_asked_once(hooks: SimpleNamespace) -> None:
    function = Asked()
    for factor in (0.5, 0.25):
        launch(function, (5, 2), FIXED, **CALL | {"factor": factor})

    assert function.asked == [CALL | FIXED]
    address = NUMBERS.data_ptr()
    again = (5, 2, 1, 70, "function", "packed", None, None, None, address, address + 64, 48, 0.25, 64, False)
    assert function.again == [again]
    assert not function.hooked


@pytest.mark.parametrize(
    "change",
    [
        {"p_in": NUMBERS.int()},
        {"p_in": NUMBERS[1:]},
        {"p_in": None},
        {"num_rows": 1},
        {"num_rows": 49},
        {"num_rows": 1 << 31},
        {"num_rows": -(1 << 31) - 16},
        {"num_rows": 48.0},
        {"factor": 1},
        {"WIDE": True},
        {"num_stages": 2},
    ],
    ids=str,
)
def test_calls_that_are_compiled_apart_are_told_apart(change: dict[str, Any], hooks: SimpleNamespace) -> None:
    function = Asked()
    for changed in ({}, change, {}, change):
        launch(function, (1,), FIXED, **CALL | changed)

    assert len(function.asked) == len(function.again) == 2
    assert function.asked[1] == CALL | FIXED | change


@pytest.mark.parametrize(
    "change",
    [{"p_in": NUMBERS[32:]}, {"num_rows": 32}, {"num_rows": 0}, {"num_rows": -16}, {"factor": 1.0}],
    ids=str,
)
def test_calls_that_are_compiled_alike_are_not(change: dict[str, Any], hooks: SimpleNamespace) -> None:
    function = Asked()
    for changed in ({}, change):
        launch(function, (1,), FIXED, **CALL | changed)

    assert len(function.asked) == len(function.again) == 1


def test_constants_are_known_by_their_mapping_and_kernels_by_their_device(
    hooks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = Asked()
    for fixed in (FIXED, dict(FIXED), FIXED):
        launch(function, (1,), fixed, **CALL)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for _ in range(2):
        launch(function, (1,), FIXED, **CALL)
    launch(Asked(), (1,), FIXED, **CALL)

    assert len(function.asked) == 3
    assert [arguments[3] for arguments in function.again] == [70, 71]


def test_amd_tells_storages_beyond_32_bits_apart(
    hooks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_IS_AMD", True)
    function = Asked()
    for size in (1, 1 << 10, 1 << 30, 1 << 31):
        launch(function, (1,), FIXED, **CALL | {"p_in": torch.empty(size, device="meta"), "p_out": None})

    assert [len(arguments["p_in"]) for arguments in function.asked] == [1, 1 << 30]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_is_told(name: str, hooks: SimpleNamespace) -> None:
    function = Asked()
    getattr(hooks, name).calls.append(print)
    for _ in range(2):
        launch(function, (5, 2), FIXED, **CALL)

    assert not function.again
    assert [arguments[0] for arguments in function.hooked] == [(5, 2, 1)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"p_out": None, "p_in": None, "num_rows": 1, "factor": 0.5},
        {"p_in": None, "p_out": None, "factor": 0.5, "num_rows": 1},
        {"p_in": None, "num_rows": 1, "p_out": None, "factor": 0.5},
        {"p_in": None, "p_out": None, "num_rows": 1, "WIDE": True, "factor": 0.5},
    ],
    ids=str,
)
def test_arguments_in_another_order_are_refused(arguments: dict[str, Any], hooks: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="kernel takes pointers, numbers and constants as p_in, p_out, num_"):
        launch(Asked(), (1,), FIXED, **arguments)


def _calls() -> Iterator[tuple[str, Any, list[str]]]:
    """All calls of `launch`, by file, with the function and the names of what is given."""
    for path in sorted(Path(tq_kernels.__file__).parent.glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {
            name.name: each.module
            for each in nodes
            if isinstance(each, ast.ImportFrom)
            for name in each.names
        }
        for call in nodes:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "launch":
                assert isinstance(call.args[0], ast.Name)
                name = call.args[0].id
                function = getattr(importlib.import_module(str(imported[name])), name)
                yield f"{path.name}.{name}", function, [each.arg for each in call.keywords if each.arg]


@pytest.mark.parametrize(("function", "names"), [pytest.param(*call, id=name) for name, *call in _calls()])
def test_every_launch_names_its_arguments_in_the_order_of_the_parameters(
    function: Any, names: list[str]
) -> None:
    varying = [name for name in function.arg_names if not name.isupper()]

    assert function.arg_names[: len(varying)] == varying
    compiled._site(function.fn, (*names,))
    assert [name for name in names if name in function.arg_names and not name.isupper()] == varying
