"""One thread, a seeded generator and a device for every test of the kernels."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """OpenMP threads that spin for a core which another process holds cost far more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """Every test sees the same numbers in every run."""
    return torch.Generator().manual_seed(0x5EED)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: compiled on a GPU, else in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
