"""Tests of an engine are collected where the engine is installed: in `make test-engines`'s environment."""

from importlib.metadata import distributions

import pytest
from engines.compatibility import ENGINES, recorders

_INSTALLED = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}

collect_ignore = [folder for folder, (_, engine) in ENGINES.items() if engine not in _INSTALLED]
if _INSTALLED.get("sglang") == "0.5.17":
    # SGLang has had linkers since
    collect_ignore += ["sglang/test_linker.py", "sglang/test_linker_alone.py"]


def pytest_configure(config: pytest.Config) -> None:
    for recorder in recorders():
        config.pluginmanager.register(recorder)
