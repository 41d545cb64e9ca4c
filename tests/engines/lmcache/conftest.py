"""Servers that the tests of LMCache share, one thread for torch, and LMCache's own warnings let pass."""

import os
import uuid
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

# before LMCache is imported: it warns in every module that logs, and reports to its makers
LOGGING = "`LoggingHandler` in `opentelemetry-sdk` is deprecated"
warnings.filterwarnings("ignore", LOGGING, DeprecationWarning)
os.environ["LMCACHE_TRACK_USAGE"] = "false"

import torch  # noqa: E402
from engines.lmcache.processes import RedisServer  # noqa: E402
from store.running_server import running_server  # noqa: E402

from tq_store.client import StoreClient  # noqa: E402

# LMCache 0.5.7 has no engine inside the engine's process any more
collect_ignore = [] if find_spec("lmcache.v1.cache_engine") else ["test_remote_connector.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", f"ignore:{LOGGING}:DeprecationWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """Our server."""
    with running_server() as running:
        yield running


@pytest.fixture
def client(server: Any) -> Iterator[StoreClient]:
    """A connection to our server, with nothing in it."""
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis on a port."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def salt() -> str:
    """Keeps what a test stores apart from all else."""
    return uuid.uuid4().hex
