"""Fixtures that the tests of the store share: a real Redis server."""

from collections.abc import Iterator

import pytest
from store.redis_process import RedisProcess


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_server(shared_redis: RedisProcess) -> RedisProcess:
    """A running server with nothing in it, as it was configured at the start."""
    shared_redis.command("FLUSHALL")
    shared_redis.command("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")
    shared_redis.command("CONFIG", "RESETSTAT")
    return shared_redis
