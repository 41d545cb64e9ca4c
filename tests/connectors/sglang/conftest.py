"""A server that these tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store.running_server import running_server

from tq_store.client import StoreClient


@pytest.fixture(scope="module")
def local_socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "s"


@pytest.fixture(scope="module")
def server(local_socket: Path) -> Iterator[Any]:
    with running_server(local_socket=local_socket) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Iterator[StoreClient]:
    """A connection to an empty server."""
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection
