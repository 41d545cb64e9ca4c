"""What SGLang lacks on a CPU is there before it is imported, and its own warnings are let pass."""

import engines.sglang.cpu  # noqa: F401
import pytest
from engines.tiny_model import save_tiny_model


def pytest_configure(config: pytest.Config) -> None:
    for module in ("sglang", "torch", "torchao", "transformers", "triton"):
        config.addinivalue_line("filterwarnings", f"ignore:::{module}")
    for swig in ("SwigPyPacked", "SwigPyObject", "swigvarlink"):
        config.addinivalue_line("filterwarnings", f"ignore:builtin type {swig}:DeprecationWarning")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model of two layers, whose tokens depend on all of their prompt."""
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))
