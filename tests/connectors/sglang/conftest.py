"""A server that these tests share."""

from collections.abc import Iterator
from typing import Any

import pytest
from store.running_server import running_server

from tq_store.client import StoreClient


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with running_server() as running:
        yield running


@pytest.fixture
def client(server: Any) -> Iterator[StoreClient]:
    """A connection to an empty server."""
    with StoreClient(server.address) as connection:
        connection.purge(None)
        yield connection
