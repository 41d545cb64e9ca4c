"""The methods that the harness knows, and how users pick some."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from benchmarks.quality.methods import casts, kivi, paper_split, stock_vllm
from benchmarks.quality.methods.base import Method
from benchmarks.quality.methods.cold import cold_methods
from benchmarks.quality.methods.pages import page_methods

QUICK = ("fp8", "vllm-4bit_nc-all", "vllm-3bit_nc-all", "tq4", "tq3")
"""What ``--quick`` runs."""


def catalogue(page_tokens: int) -> list[Method]:
    """All methods, baselines first; names are unique."""
    return [
        *(casts.NOTHING, casts.BF16, casts.FP8),
        *stock_vllm.PRESETS,
        *stock_vllm.ALL_LAYERS,
        *(kivi.KIVI4, kivi.KIVI2, *kivi.FINE),
        *paper_split.SPLITS,
        *page_methods(page_tokens),
        *cold_methods(page_tokens),
    ]


def selected(methods: Sequence[Method], patterns: Sequence[str]) -> list[Method]:
    """Methods whose name matches one of the globs; all where there are none.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(method.name, pattern) for method in methods):
            names = ", ".join(method.name for method in methods)
            raise ValueError(f"no method is called {pattern!r}; there are {names}")
    return [m for m in methods if not patterns or any(fnmatchcase(m.name, p) for p in patterns)]
