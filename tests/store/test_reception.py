import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from store.running_server import WAIT_S, running_server, write_token
from store.sample_blocks import NAMESPACE, sample_block, sample_key
from store.some_quotas import quotas_over

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import NotPermitted, RpcDenied
from tq_store.server import reception as reception_module
from tq_store.server.app import Server
from tq_store.server.audit import AuditLog, NoSink
from tq_store.server.calls import ANYBODY, IDENTITY, Identity, is_local_peer
from tq_store.server.reception import Reception
from tq_store.server.tenants import Tenant


@pytest.mark.parametrize(
    ("peer", "is_local"),
    [
        ("unix:", True),
        ("unix:/run/tq-store.sock", True),
        ("unix-abstract:x", True),
        ("ipv4:127.0.0.1:5", True),
        ("ipv4:127.8.9.1:5", True),
        ("ipv6:[::1]:5", True),
        ("ipv6:%5B::1%5D:5", True),
        ("ipv6:[::ffff:127.0.0.1]:5", True),
        ("ipv6:[::ffff:10.0.0.1]:5", False),
        ("ipv4:10.0.0.1:5", False),
        ("ipv4:128.0.0.1:5", False),
        ("ipv6:[fe80::1%eth0]:5", False),
        ("ipv6:[2001:db8::1]:5", False),
        ("vsock:1:2", False),
        ("", False),
        ("localhost:5", False),
    ],
)
def test_which_peers_are_this_machine(peer: str, is_local: bool) -> None:
    assert is_local_peer(peer) == is_local


def reception(**settings: bool) -> Reception:
    return Reception(quotas_over(), AuditLog(NoSink()), **settings)


@pytest.mark.parametrize("method", ["Stats", "Inspect"])
def test_who_is_an_admin(method: str) -> None:
    plain, admin = (
        Identity(tenant=Tenant(name="a", is_admin=is_admin), token_id="1") for is_admin in (False, True)
    )
    here, there = "ipv4:127.0.0.1:5", "ipv4:10.0.0.1:5"
    for identity, peer, with_remote_admin, may in [
        (ANYBODY, here, False, True),
        (ANYBODY, there, False, False),
        (ANYBODY, there, True, True),
        (plain, here, True, False),
        (plain, there, True, False),
        (admin, here, False, True),
        (admin, there, False, True),
    ]:
        IDENTITY.set(identity)
        desk = reception(with_remote_admin=with_remote_admin)
        call = desk.identify(method, peer)
        assert call.is_admin == may
        desk.admit(desk.identify("Lookup", peer))
        if may:
            desk.admit(call)
        else:
            with pytest.raises(NotPermitted, match=f"{method} takes an admin"):
                desk.admit(call)


@pytest.fixture
def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every caller were on another machine."""
    monkeypatch.setattr(reception_module, "is_local_peer", lambda _: False)


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    return ClientConfig(token_file=write_token(tmp_path))


@pytest.mark.usefixtures("from_elsewhere")
def test_a_shared_token_is_no_admins_from_another_machine(config: ClientConfig) -> None:
    with (
        running_server(token_file=config.token_file) as server,
        StoreClient(server.address, config=config) as client,
    ):
        client.put([sample_block(1)])
        for call in (client.stats, lambda: client.inspect(sample_key(1)), lambda: client.purge(None)):
            with pytest.raises(RpcDenied, match="admin"):
                call()
        assert client.lookup([sample_key(1)]) == 1
        assert client.purge(NAMESPACE) == 1


@pytest.mark.usefixtures("from_elsewhere")
def test_it_is_if_the_operator_says_so(config: ClientConfig) -> None:
    with (
        running_server(token_file=config.token_file, remote_admin=True) as server,
        StoreClient(server.address, config=config) as client,
    ):
        assert client.stats().version
        assert client.purge(None) == 0


@pytest.fixture
def server(config: ClientConfig, tmp_path: Path) -> Iterator[Server]:
    with running_server(token_file=config.token_file, metrics_port=0) as started:
        yield started


def test_metrics_stay_on_this_machine_and_hold_no_secret(server: Server, config: ClientConfig) -> None:
    assert server.metrics_url is not None
    assert server.metrics_url.startswith("http://127.0.0.1:")
    assert config.token_file is not None
    token = config.token_file.read_text()
    with StoreClient(server.address, config=config) as client:
        client.put([sample_block(1)])
    for path in ("/metrics", "/status.json", "/"):
        url = server.metrics_url.removesuffix("/metrics") + path
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            text = answer.read().decode()
        assert token not in text
        assert sample_key(1).hex()[64:] not in text
    assert json.loads(urllib.request.urlopen(url + "status.json", timeout=WAIT_S).read())
