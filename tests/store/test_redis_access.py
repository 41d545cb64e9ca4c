"""The Redis backend over TLS with a client certificate, as an ACL user that may do no more than it must."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from store.backend_contract import BackendContract
from store.redis_arrangements import free_port, running_cluster
from store.redis_process import RedisProcess
from store.running_server import make_certificates, running_server, wait_until
from store.sample_blocks import bytes_of, keys_of, sample_block, sample_blocks

from tq_store.backends.redis import RedisBackend, RedisLimits
from tq_store.client import StoreClient
from tq_store.errors import BackendUnavailable
from tq_store.results import PutOutcome

pytestmark = pytest.mark.redis

README = Path(__file__).parents[2] / "deploy" / "README.md"
LIMITS = RedisLimits(timeout_s=10.0, lookup_timeout_s=10.0, ttl_s=600, census_s=None)
PASSWORD = "hunter2 first"
ADMIN = ("--user", "admin", "--pass", "of-the-admin")


@dataclass(frozen=True)
class GuardedServer:
    """A server that takes TLS with client certificates, and two users: ours, and an admin for the tests."""

    process: RedisProcess
    directory: Path
    port: int

    def access(self, **changes: Any) -> dict[str, Any]:
        files = {"tls_ca": "ca.pem", "tls_cert": "client.pem", "tls_key": "client.key"}
        paths: dict[str, Any] = {name: self.directory / file for name, file in files.items()}
        paths |= {"user": "tq-store", "password_file": self.directory / "password"}
        return {name: value for name, value in (paths | changes).items() if value is not None}

    def url(self, host: str = "127.0.0.1") -> str:
        return f"rediss://{host}:{self.port}"

    def admin(self, *command: str) -> str:
        return self.process.command(*ADMIN, *command)


def rules_of_our_user() -> str:
    """The rules that the runbook tells operators to write."""
    text = README.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("user tq-store on ")]
    return line.partition("PASSWORD ")[2]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    directory = tmp_path_factory.mktemp("guarded")
    make_certificates(directory)
    other = directory / "other"
    other.mkdir()
    make_certificates(other)
    (directory / "users.acl").write_text(
        "user default off\nuser admin on >of-the-admin ~* &* +@all\nuser tq-store on nopass\n"
    )
    port = free_port()
    process = RedisProcess(
        directory,
        *("--tls-port", str(port), "--bind", "127.0.0.1", "127.0.0.2"),
        *("--tls-cert-file", "server.pem", "--tls-key-file", "server.key", "--tls-ca-cert-file", "ca.pem"),
        *("--aclfile", "users.acl"),
    )
    yield GuardedServer(process, directory, port)
    process.kill()


@pytest.fixture
def server(shared_server: GuardedServer) -> GuardedServer:
    shared_server.admin("FLUSHALL")
    write_password(shared_server, PASSWORD)
    return shared_server


def write_password(server: GuardedServer, password: str) -> None:
    path = server.directory / "password"
    path.touch(mode=0o600)
    path.write_text(f"{password}\n")
    rules = rules_of_our_user().split()
    assert server.admin("ACL", "SETUSER", "tq-store", "reset", "on", f">{password}", *rules) == "OK"


class TestContract(BackendContract):
    @pytest.fixture
    async def backend(self, server: GuardedServer) -> AsyncIterator[RedisBackend]:
        backend = await RedisBackend.open(server.url(), limits=LIMITS, **server.access())
        yield backend
        await backend.close()


async def test_our_user_needs_nothing_more_than_the_runbook_gives_it(server: GuardedServer) -> None:
    server.admin("ACL", "LOG", "RESET")
    backend = await RedisBackend.open(server.url(), **server.access())
    try:
        blocks = sample_blocks(4)
        await backend.put(blocks)
        await backend.quarantine(blocks[0][0])
        assert await backend.get(keys_of(blocks)) == [None, *bytes_of(blocks)[1:]]
        assert await backend.delete(keys_of(blocks[:2])) == [False, True]
        assert (await backend.stats()).num_blocks == 3
        assert await backend.purge() == 2
    finally:
        await backend.close()
    assert server.admin("ACL", "LOG") == ""


@pytest.mark.parametrize(
    ("host", "changes", "complaint"),
    [
        ("127.0.0.1", {"tls_ca": "other/ca.pem"}, "certificate verify failed"),
        ("127.0.0.1", {"tls_ca": None}, "certificate verify failed"),
        ("127.0.0.2", {}, "certificate verify failed: IP address mismatch"),
        ("127.0.0.1", {"tls_cert": "other/client.pem", "tls_key": "other/client.key"}, "does not work"),
        ("127.0.0.1", {"tls_cert": None, "tls_key": None}, "does not work"),
        ("127.0.0.1", {"password_file": "wrong"}, "invalid username-password"),
        ("127.0.0.1", {"user": "nobody"}, "invalid username-password"),
        ("127.0.0.1", {"user": None, "password_file": None}, "Authentication required"),
    ],
)
async def test_strangers_are_turned_away_on_either_side(
    server: GuardedServer, host: str, changes: dict[str, str | None], complaint: str
) -> None:
    (server.directory / "wrong").touch(mode=0o600)
    (server.directory / "wrong").write_text("hunter2 wrong")
    files = {
        name: server.directory / value if value is not None and name != "user" else value
        for name, value in changes.items()
    }
    with pytest.raises(BackendUnavailable, match=complaint) as caught:
        await RedisBackend.open(server.url(host), limits=LIMITS, **server.access(**files))
    shown: BaseException | None = caught.value
    while shown is not None:
        assert "hunter2" not in str(shown)
        shown = shown.__cause__


async def close_connections(server: GuardedServer, backend: RedisBackend) -> None:
    """From the server's side, and wait until ours has noticed."""
    server.admin("CLIENT", "KILL", "USER", "tq-store")
    (shard,) = backend._servers.shards
    connections = list(shard._link.pool._available_connections)
    assert connections
    async with asyncio.timeout(20):
        while not all([await connection._parser.can_read() for connection in connections]):
            await asyncio.sleep(0.01)


async def test_a_password_is_replaced_without_a_restart(server: GuardedServer) -> None:
    backend = await RedisBackend.open(server.url(), limits=LIMITS, **server.access())
    try:
        assert await backend.put([sample_block(1)]) == [PutOutcome.STORED]
        write_password(server, "hunter2 second")
        await close_connections(server, backend)
        assert await backend.get([sample_block(1)[0]]) == [sample_block(1)[1]]
        (server.directory / "password").unlink()
        await close_connections(server, backend)
        with pytest.raises(BackendUnavailable, match=r"password file .* cannot be read") as caught:
            await backend.get([sample_block(1)[0]])
        assert "hunter2" not in str(caught.value)
    finally:
        await backend.close()


async def test_a_command_that_our_user_may_not_use_is_named(server: GuardedServer) -> None:
    server.admin("ACL", "SETUSER", "tq-store", "-set")
    backend = await RedisBackend.open(server.url(), limits=LIMITS, **server.access())
    try:
        with pytest.raises(BackendUnavailable, match="no permissions to run the 'set' command"):
            await backend.put([sample_block(1)])
    finally:
        await backend.close()


def test_two_servers_share_it_and_each_is_its_near_cache(
    server: GuardedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = {f"redis_{name}": value for name, value in server.access().items()}
    settings["redis_url"] = server.url()
    blocks = sample_blocks(5)
    with running_server(**settings) as first, running_server(**settings) as second:
        with StoreClient(first.address) as client:
            client.put(blocks)
        wait_until(lambda: server.admin("DBSIZE") == "5")
        with StoreClient(second.address) as client:
            assert client.lookup(keys_of(blocks)) == 5
            assert dict(client.get(keys_of(blocks))) == dict(enumerate(bytes_of(blocks)))
            assert dict(client.get(keys_of(blocks))) == dict(enumerate(bytes_of(blocks)))
            stats = client.stats()
        assert stats.counters["hits_redis"] == stats.counters["promotions"] == 5
        assert stats.counters["hits_memory"] == 5, "the second time from its own memory"
        assert [shard.name for shard in stats.shards["redis"]] == [f"127.0.0.1:{server.port}"]
    assert "hunter2" not in caplog.text


async def test_a_cluster_over_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    files = {"tls_ca": "ca.pem", "tls_cert": "client.pem", "tls_key": "client.key"}
    access = {name: tmp_path / file for name, file in files.items()}
    blocks = sample_blocks(40, 20_000)
    with running_cluster(tmp_path, node_timeout_ms=15_000, certificates=tmp_path) as cluster:
        url = cluster.url.replace("redis+cluster", "rediss+cluster")
        backend = await RedisBackend.open(url, limits=LIMITS, **access)
        try:
            assert await backend.put(blocks) == [PutOutcome.STORED] * 40
            assert await backend.get(keys_of(blocks)) == bytes_of(blocks)
            assert len(backend.shards()) == 3
        finally:
            await backend.close()
        with pytest.raises(BackendUnavailable, match="no node of the redis cluster tells its slots"):
            await RedisBackend.open(cluster.url, limits=LIMITS)


async def test_a_stalled_server_does_not_stall_the_close(server: GuardedServer) -> None:
    backend = await RedisBackend.open(server.url(), limits=LIMITS, **server.access())
    server.process.pause()
    try:
        async with asyncio.timeout(5):
            await backend.close()
    finally:
        server.process.resume()
    # TLS ends with an exchange, and only now does the other side take part in it
    await asyncio.to_thread(wait_until, lambda: "user=tq-store" not in server.admin("CLIENT", "LIST"))
