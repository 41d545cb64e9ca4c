"""The methods that the harness knows, and how users pick some."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from benchmarks.quality.methods import casts, kivi, paper_split, stock_vllm
from benchmarks.quality.methods.base import Method
from benchmarks.quality.methods.by_layer import PagesByLayer
from benchmarks.quality.methods.cold import cold_methods
from benchmarks.quality.methods.pages import page_methods
from tq_store.layer_table import LayerTable

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


def selected(page_tokens: int, patterns: Sequence[str]) -> list[Method]:
    """Methods whose name matches one of the globs, then tables by layer; all methods where there is neither.

    Args:
        page_tokens: Tokens in our pages.
        patterns: Globs; what has a plus is a table, as in ``tq3+tq4:0-1,29``.

    Raises:
        ValueError: A glob matches nothing, or there is no such preset.
        ConfigError: A table is none.
    """
    methods = catalogue(page_tokens)
    tables = dict.fromkeys(LayerTable.parse(pattern) for pattern in patterns if "+" in pattern)
    globs = [pattern for pattern in patterns if "+" not in pattern]
    for pattern in globs:
        if not any(fnmatchcase(method.name, pattern) for method in methods):
            names = ", ".join(method.name for method in methods)
            raise ValueError(f"no method is called {pattern!r}; there are {names}")
    found = [m for m in methods if not patterns or any(fnmatchcase(m.name, glob) for glob in globs)]
    return [*found, *(PagesByLayer(table, page_tokens) for table in tables)]
