"""Numbers that vary from step to step make no new kernels, for which a request would wait."""

import json
import os
import subprocess
import sys

import pytest

_LIST = """
import importlib, json
from triton.runtime.jit import JITFunction

launched = {
    "decode": ["attend_split"],
    "dequantize": ["dequantize_sides"],
    "extend": ["attend_prefix", "attend_raw"],
    "hopper_columns": ["prepare_columns", "merge_columns"],
    "hopper_decode": ["attend_split"],
    "hopper_quantize": ["quantize_windows"],
    "merge": ["merge_splits"],
    "prepare_query": ["prepare_query"],
    "quantize": ["quantize_runs"],
    "step": ["prepare"],
}
for module, names in launched.items():
    for name in names:
        function = getattr(importlib.import_module(f"tq_kernels.device.{module}"), name)
        assert isinstance(function, JITFunction)
        for each in function.params:
            facts = each.do_not_specialize, each.do_not_specialize_on_alignment
            print(json.dumps([f"{module}.{name}", each.name, *facts]))
"""
_VARY = {
    "clock",
    "first_position",
    "num_columns",
    "num_pages",
    "num_seqs",
    "num_sinks",
    "num_splits",
    "num_tokens",
    "padded_columns",
    "prefix_len",
    "table_stride",
    "window",
}
_ROWS_OF_TABLES = {("extend.attend_prefix", "p_table"), ("dequantize.dequantize_sides", "p_indices")}
"""Pointers to any row of a block table, which 16 bytes do not divide."""


@pytest.fixture(scope="module")
def parameters() -> list[tuple[str, str, bool, bool]]:
    """Of every kernel, as Triton's compiler sees them: its interpreter has none."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _LIST]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def test_numbers_that_vary_are_not_looked_at(parameters: list[tuple[str, str, bool, bool]]) -> None:
    assert {name for _, name, _, _ in parameters} >= _VARY
    assert not [(kernel, name) for kernel, name, is_plain, _ in parameters if name in _VARY and not is_plain]


def test_rows_of_tables_may_lie_anywhere(parameters: list[tuple[str, str, bool, bool]]) -> None:
    assert {
        (kernel, name) for kernel, name, _, lies_anywhere in parameters if lies_anywhere
    } == _ROWS_OF_TABLES
