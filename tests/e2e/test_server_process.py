"""A server in a process of its own, started as operators start it, and stopped in every way there is."""

import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from store.running_server import WAIT_S, make_certificates, wait_until, write_token
from store.sample_blocks import bytes_of, keys_of, sample_block, sample_blocks, sample_key
from store.server_process import CLI, ServerProcess

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs

PATIENT = ClientConfig(lookup_timeout_s=WAIT_S, transfer_timeout_s=WAIT_S, max_attempts=10, backoff_s=0.05)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=WAIT_S)


class OpenPut:
    """A put whose second frame waits for the test."""

    def __init__(self, channel: grpc.Channel, block: tuple[BlockKey, bytes]) -> None:
        self.may_finish = threading.Event()
        self._key, self._data = block
        self.call = stubs.BlockStoreStub(channel).Put.future(self._frames(), timeout=WAIT_S)

    def _frames(self) -> Iterator[pb.BlockFrame]:
        yield pb.BlockFrame(key=self._key, block_bytes=len(self._data), data=self._data[:100])
        self.may_finish.wait(WAIT_S)
        yield pb.BlockFrame(offset=100, data=self._data[100:])


def answers_to(server: ServerProcess, path: str) -> str:
    """What the metrics port says, or why it does not."""
    try:
        with urllib.request.urlopen(server.metrics_url.replace("metrics", path), timeout=WAIT_S) as answer:
            return str(answer.read().decode().strip())
    except urllib.error.HTTPError as error:
        return str(error)


def watch_health(channel: grpc.Channel) -> Iterator[int]:
    """Statuses as they change; the first is there when this returns."""
    answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    assert next(answers).status == health_pb2.HealthCheckResponse.SERVING
    return (answer.status for answer in answers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_calls_in_flight_finish_and_takes_no_new_ones(
    tmp_path: Path, number: signal.Signals
) -> None:
    disk = ("--disk-path", tmp_path, "--disk-budget", "1MiB")
    with ServerProcess(*disk) as server, grpc.insecure_channel(server.address) as channel:
        statuses = watch_health(channel)
        put = OpenPut(channel, sample_block(1))
        wait_until(server.is_receiving)
        server.send(number)
        assert next(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert answers_to(server, "livez") == "alive"
        assert answers_to(server, "readyz").endswith("503: Service Unavailable")
        with pytest.raises(grpc.RpcError, match="the server is shutting down") as refused:
            stubs.BlockStoreStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        put.may_finish.set()
        assert put.call.result(WAIT_S).outcomes == [pb.PUT_OUTCOME_STORED]
        code, log = server.end()
        assert code == 0
        assert "cut" not in log
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        assert list(client.get([sample_key(1)])) == [(0, sample_block(1)[1])]


def test_a_call_that_does_not_finish_is_cut_after_the_grace_period() -> None:
    with ServerProcess("--grace", "100ms") as server, grpc.insecure_channel(server.address) as channel:
        put = OpenPut(channel, sample_block(1))
        wait_until(server.is_receiving)
        server.send(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            put.call.result(WAIT_S)
        code, log = server.end()
        assert code == 0
        assert "1 calls were still running after 0.1 s and are cut" in log
        put.may_finish.set()


def test_a_second_signal_ends_the_process_at_once() -> None:
    with ServerProcess("--grace", "1h") as server, grpc.insecure_channel(server.address) as channel:
        statuses = watch_health(channel)
        put = OpenPut(channel, sample_block(1))
        wait_until(server.is_receiving)
        server.send(signal.SIGTERM)
        assert next(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
        server.send(signal.SIGTERM)
        assert server.end()[0] == -signal.SIGTERM
        put.may_finish.set()


def test_blocks_on_disk_outlive_a_kill(tmp_path: Path) -> None:
    blocks = sample_blocks(20, 50_000)
    disk = ("--disk-path", tmp_path, "--disk-budget", "64MiB")
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        assert client.put(blocks) == [PutOutcome.STORED] * 20
        wait_until(lambda: client.stats().tiers["disk"].num_blocks == 20)
        server.send(signal.SIGKILL)
        assert server.end()[0] == -signal.SIGKILL
    with ServerProcess(*disk) as server, StoreClient(server.address, config=PATIENT) as client:
        assert client.lookup(keys_of(blocks)) == 20
        assert [data for _, data in client.get(keys_of(blocks))] == bytes_of(blocks)
        assert client.stats().counters["hits_disk"] == 20


def test_a_server_killed_in_the_middle_of_a_get_costs_an_error_and_no_wrong_byte(tmp_path: Path) -> None:
    blocks = sample_blocks(8, 8 << 20)
    disk = ("--disk-path", tmp_path, "--disk-budget", "256MiB")
    hasty = ClientConfig(transfer_timeout_s=WAIT_S, max_attempts=2, backoff_s=0.05)
    with ServerProcess(*disk) as server, StoreClient(server.address, config=hasty) as client:
        client.put(blocks)
        wait_until(lambda: client.stats().tiers["disk"].num_blocks == 8)
        arriving = client.get(keys_of(blocks))
        got = [next(arriving), next(arriving)]
        server.send(signal.SIGKILL)
        server.end()
        with pytest.raises(RpcUnavailable):
            got.extend(arriving)
        assert got == list(enumerate(bytes_of(blocks)))[: len(got)]
        assert len(got) < 8
        address = server.address
    with StoreClient(address, config=PATIENT) as client:
        with pytest.raises(RpcUnavailable):
            StoreClient(address, config=hasty).ping()
        with ServerProcess(*disk, listen=address):
            assert list(client.get(keys_of(blocks))) == list(enumerate(bytes_of(blocks)))


def test_a_client_finds_its_server_again_after_a_restart() -> None:
    with ServerProcess() as server, StoreClient(server.address, config=PATIENT) as client:
        client.ping()
        server.send(signal.SIGKILL)
        server.end()
        with ServerProcess(listen=server.address):
            assert client.ping().version
            assert client.put([sample_block(1)]) == [PutOutcome.STORED]


def test_beyond_loopback_with_tls_and_a_token(tmp_path: Path) -> None:
    refused = cli("serve", "--listen", "0.0.0.0:0")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "tq-store: listen is 0.0.0.0:0, which other machines can reach: add --tls-cert and --tls-key and "
        "--token-file or --tenants-file, or listen on 127.0.0.1"
    )
    make_certificates(tmp_path)
    token = ("--token-file", write_token(tmp_path))
    tls = ("--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.key")
    with ServerProcess(*tls, *token, listen="0.0.0.0:0") as server:
        address = ("--address", server.address.replace("0.0.0.0", "127.0.0.1"))
        ca = ("--tls-ca", tmp_path / "ca.pem")
        assert cli("ping", *address, *ca, *token).returncode == 0
        without_token = cli("ping", *address, *ca)
        assert without_token.returncode == 2
        assert "the token is missing or wrong" in without_token.stderr
        assert cli("ping", *address, *token).returncode == 3
        server.send(signal.SIGTERM)
        code, log = server.end()
        assert code == 0
        assert (tmp_path / "token").read_text() not in log


def test_settings_reach_the_process_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tq-store.toml").write_text("[server]\nmemory_budget = '3MiB'\n")
    monkeypatch.setenv("TQ_STORE_MEMORY_BUDGET", "5MiB")
    monkeypatch.setenv("TQ_STORE_SERVICE_HOST", "10.0.0.1")
    for options, budget_bytes in (((), 5 << 20), (("--config", tmp_path / "tq-store.toml"), 3 << 20)):
        with ServerProcess(*options) as server, StoreClient(server.address, config=PATIENT) as client:
            assert client.stats().tiers["memory"].budget_bytes == budget_bytes
    assert os.environ["TQ_STORE_MEMORY_BUDGET"] == "5MiB"


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    with ServerProcess() as server:
        second = cli("serve", "--listen", server.address)
        assert second.returncode == 2
        last = second.stderr.splitlines()[-1]
        assert last.startswith(f"tq-store: cannot listen on {server.address}: another process may use it")
