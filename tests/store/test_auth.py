import logging
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from store.running_server import TOKEN, WAIT_S, make_certificates, running_server, write_token
from store.sample_blocks import sample_block, sample_key

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcDenied, RpcUnavailable
from tq_store.rpc import token as token_module
from tq_store.rpc.token import TokenFile
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server.app import Server
from tq_store.server.tokens import new_token

NEW_TOKEN = "a-newer-token-of-some-length"
PATIENT = ClientConfig(lookup_timeout_s=WAIT_S, max_attempts=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    token_file = write_token(tmp_path, f"{NEW_TOKEN}\n{TOKEN}\n")
    with running_server(token_file=token_file) as started:
        yield started


def client_with(server: Server, directory: Path, token: str) -> StoreClient:
    directory.mkdir()
    return StoreClient(server.address, config=ClientConfig(token_file=write_token(directory, token)))


@pytest.mark.parametrize("token", [TOKEN, NEW_TOKEN])
def test_each_token_of_the_file_lets_in(server: Server, tmp_path: Path, token: str) -> None:
    with client_with(server, tmp_path / "client", token) as client:
        client.put([sample_block(1)])
        assert client.lookup([sample_key(1)]) == 1


def test_a_wrong_token_lets_nobody_in(server: Server, tmp_path: Path) -> None:
    with client_with(server, tmp_path / "client", TOKEN[:-1] + "?") as client:
        for call in (
            client.ping,
            client.stats,
            lambda: client.purge(None),
            lambda: list(client.get([sample_key(1)])),
            lambda: client.put([sample_block(1)]),
        ):
            with pytest.raises(RpcDenied, match="missing or wrong; give the client a token_file"):
                call()


def test_a_token_file_may_hold_hashes_which_are_no_tokens_themselves(tmp_path: Path) -> None:
    token, entry = new_token()
    with running_server(token_file=write_token(tmp_path, f"{TOKEN}\n{entry}\n")) as server:
        for accepted in (token, TOKEN):
            with client_with(server, tmp_path / accepted, accepted) as client:
                assert client.ping().version
        for wrong in (str(entry), token[:-1] + ("0" if token[-1] != "0" else "1")):
            with client_with(server, tmp_path / wrong, wrong) as client, pytest.raises(RpcDenied):
                client.ping()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", TOKEN)],
        [("authorization", f"bearer {TOKEN}")],
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
        [("authorization", "Bearer ")],
        [("x-authorization", f"Bearer {TOKEN}")],
    ],
)
def test_what_is_not_exactly_a_token_lets_nobody_in(server: Server, metadata: list[tuple[str, str]]) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = stubs.BlockStoreStub(channel)
        with pytest.raises(grpc.RpcError) as call:
            stub.Ping(pb.PingRequest(), metadata=metadata, timeout=WAIT_S)
        assert call.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_health_check_is_open_and_the_rest_is_not(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # a watch lasts for ever, so strangers could fill the server with them
        with pytest.raises(grpc.RpcError) as call:
            next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S))
        assert call.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        with pytest.raises(grpc.RpcError) as call:
            list(reflection.ServerReflectionInfo(asked, timeout=WAIT_S))
        assert call.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_denied_calls_are_counted_under_names_that_callers_cannot_invent(tmp_path: Path) -> None:
    with (
        running_server(token_file=write_token(tmp_path), metrics_port=0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for method in ("/tq_store.rpc.v1.BlockStore/Ping", "/tq_store.rpc.v1.BlockStore/Made-up", "/x/y"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(method, None, None)(b"", timeout=WAIT_S)
        assert server.metrics_url is not None
        text = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
    assert 'tq_store_requests_total{method="Ping",status="UNAUTHENTICATED"} 1.0' in text
    assert 'tq_store_requests_total{method="other",status="UNAUTHENTICATED"} 2.0' in text
    assert "Made-up" not in text


def test_tokens_are_not_logged(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "quite-a-wrong-token-0"
    with (
        client_with(server, tmp_path / "right", TOKEN) as right,
        client_with(server, tmp_path / "wrong", wrong) as denied,
    ):
        right.ping()
        with pytest.raises(RpcDenied) as refusal:
            denied.ping()
    for shown in (caplog.text, str(refusal.value), repr(vars(right)), repr(server)):
        assert wrong not in shown
        assert NEW_TOKEN not in shown


def test_a_client_follows_its_token_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_module, "_CHECK_S", 0.0)
    file = write_token(tmp_path, "a-token-that-nobody-takes")
    with StoreClient(server.address, config=ClientConfig(token_file=file)) as client:
        with pytest.raises(RpcDenied):
            client.ping()
        file.write_text(TOKEN)
        assert client.ping().version
        file.write_text("short")
        assert client.ping().version, "a file that cannot be used changes nothing"
        file.unlink()
        assert client.ping().version
    complaints = [record.message for record in caplog.records if "stays as it was" in record.message]
    assert len(complaints) == 2


def test_a_token_file_is_looked_at_once_a_second(tmp_path: Path) -> None:
    now_s = [0.0]
    file = TokenFile(write_token(tmp_path), clock=lambda: now_s[0])
    write_token(tmp_path, NEW_TOKEN)
    assert file.current() == TOKEN
    now_s[0] = 1.0
    assert file.current() == NEW_TOKEN


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


def server_tls(files: Path) -> dict[str, Path]:
    return {"tls_cert": files / "server.pem", "tls_key": files / "server.key"}


def client_tls(files: Path, *, own: bool = False) -> ClientConfig:
    if not own:
        return ClientConfig(tls_ca=files / "ca.pem", lookup_timeout_s=WAIT_S, max_attempts=1)
    return ClientConfig(
        tls_ca=files / "ca.pem", tls_cert=files / "client.pem", tls_key=files / "client.key", max_attempts=1
    )


def test_tls_with_a_certificate_of_the_right_authority(files: Path) -> None:
    with running_server(**server_tls(files)) as server:
        with StoreClient(server.address, config=client_tls(files)) as client:
            assert client.put([sample_block(1)])
            assert client.lookup([sample_key(1)]) == 1
        for config in (PATIENT, ClientConfig(tls=True, max_attempts=1)):
            with StoreClient(server.address, config=config) as client, pytest.raises(RpcUnavailable):
                client.ping()


def test_mutual_tls_turns_away_who_shows_no_certificate(files: Path) -> None:
    with running_server(**server_tls(files), tls_client_ca=files / "ca.pem") as server:
        with StoreClient(server.address, config=client_tls(files, own=True)) as client:
            assert client.ping().version
        with StoreClient(server.address, config=client_tls(files)) as client, pytest.raises(RpcUnavailable):
            client.ping()


def test_a_certificate_is_replaced_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, fresh = tmp_path / "served", tmp_path / "fresh"
    for directory in (served, fresh):
        directory.mkdir()
        make_certificates(directory)

    def trusts(authority: Path) -> bool:
        """Whether a new client that trusts only this authority, and shows its certificate, gets through."""
        with StoreClient(server.address, config=client_tls(authority, own=True)) as client:
            try:
                client.ping()
            except RpcUnavailable:
                return False
            return True

    old = tmp_path / "old"
    shutil.copytree(served, old)
    with (
        running_server(**server_tls(served), tls_client_ca=served / "ca.pem") as server,
        StoreClient(server.address, config=client_tls(old, own=True)) as standing,
    ):
        assert standing.ping().version
        assert (trusts(old), trusts(fresh)) == (True, False)
        shutil.copy(fresh / "server.pem", served / "server.pem")
        assert trusts(old), "half of a replacement changes nothing"
        assert "the certificate stays as it was: the TLS files may not fit together" in caplog.text
        shutil.copy(fresh / "server.key", served / "server.key")
        shutil.copy(fresh / "ca.pem", served / "ca.pem")
        assert (trusts(old), trusts(fresh)) == (False, True)
        (served / "server.pem").unlink()
        assert trusts(fresh)
        assert standing.ping().version, "a connection that stands goes on"


def test_every_address_is_served_with_tls_and_a_token(files: Path, tmp_path: Path) -> None:
    token_file = write_token(tmp_path)
    with running_server(listen="0.0.0.0:0", **server_tls(files), token_file=token_file) as server:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        config = ClientConfig(tls_ca=files / "ca.pem", token_file=token_file)
        with StoreClient(address, config=config) as client:
            assert client.ping().version


@pytest.mark.parametrize(
    ("cert", "key", "complaint"),
    [
        ("absent.pem", "server.key", r"absent\.pem cannot be read"),
        ("server.pem", "client.key", "the TLS files may not fit together"),
        ("ca.key", "server.key", "the TLS files may not fit together"),
    ],
)
def test_tls_files_that_cannot_be_used_stop_the_start(
    files: Path, cert: str, key: str, complaint: str
) -> None:
    tls = {"tls_cert": files / cert, "tls_key": files / key}
    with pytest.raises(ConfigError, match=complaint), running_server(**tls):
        pass


def test_a_token_file_that_everybody_can_read_stops_the_start(tmp_path: Path) -> None:
    token_file = write_token(tmp_path)
    token_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"), running_server(token_file=token_file):
        pass
