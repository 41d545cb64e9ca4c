"""vLLM's own warnings pass, threads are few, and models come with their pools."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest

# before vLLM is imported
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["TRITON_INTERPRET"] = "0"  # the interpreter takes seconds where the reference takes milliseconds
warnings.simplefilter("ignore")

import torch  # noqa: E402
from engines.vllm_stock.model_on_cpu import ModelOnCpu, vllm_config  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # vLLM's and its dependencies' own


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model(tmp_path: Any) -> Callable[..., ModelOnCpu]:
    """A model on the CPU, its pool allocated, for a dtype and what else the configuration has."""

    def make(
        cache_dtype: str = "tq4",
        *,
        cache: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        windows: tuple[int | None, ...] = (None, None),
        layer: dict[str, Any] | None = None,
        **others: Any,
    ) -> ModelOnCpu:
        config = vllm_config(
            tmp_path / "model",
            cache={"cache_dtype": cache_dtype, **(cache or {})},
            model=model or {},
            **others,
        )
        return ModelOnCpu(config, windows, **(layer or {})).allocate()

    return make


@pytest.fixture
def speculative(tmp_path: Any) -> Callable[[int], dict[str, Any]]:
    """What makes an engine verify so many drafts a step, those of n-grams."""

    def configured(num_drafts: int) -> dict[str, Any]:
        from vllm.config import ParallelConfig, SpeculativeConfig

        return {
            "speculative_config": SpeculativeConfig(
                method="ngram",
                num_speculative_tokens=num_drafts,
                prompt_lookup_max=3,
                target_parallel_config=ParallelConfig(),
            )
        }

    return configured
