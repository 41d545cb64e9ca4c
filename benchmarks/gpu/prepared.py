"""A case ready to be timed: its calls, a check of that very configuration, and its least traffic."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.inputs import Arena
from benchmarks.gpu.timing import Call
from benchmarks.registry import Case

HALF_ERROR = 1e-2
"""Largest relative error of a result with half-precision operands; wrong pages or scales err by far more."""

LSE_ERROR = 1e-2
"""Largest absolute error of a log-sum-exp, whose scores had half-precision operands."""

Errors = dict[str, tuple[float, float]]
"""Errors by what was compared, each with how large it may be."""

_MODULES = {
    "decode": "benchmarks.gpu.decode",
    "verify": "benchmarks.gpu.decode",
    "extend": "benchmarks.gpu.extend",
    "quantize": "benchmarks.gpu.quantize",
    "append": "benchmarks.gpu.quantize",
    "dequantize": "benchmarks.gpu.dequantize",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case in device memory.

    Args:
        calls: The op on each set of inputs.
        check: Runs the first call on poisoned outputs and compares with the reference.
        num_bytes: Bytes that one call must move.
        flops: Floating-point operations that it must do.
    """

    calls: list[Call]
    check: Callable[[], Errors]
    num_bytes: int
    flops: int = 0


def prepare(case: Case, arena: Arena) -> Prepared:
    """Inputs, outputs and calls of a case. Imports the case's own op and no other."""
    prepared: Prepared = getattr(importlib.import_module(_MODULES[case.op]), case.op)(case, arena)
    return prepared


def failures(errors: Errors) -> list[str]:
    """What is wrong, in words. An error that is NaN is wrong."""
    return [
        f"{name} errs by {error:.2e}, allowed {limit:.0e}"
        for name, (error, limit) in errors.items()
        if not error <= limit
    ]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Length of the difference over the length of what was wanted."""
    return float((got.float() - want.float()).norm() / want.float().norm())
