"""Blocks through sockets beside grpc, and what happens when one of both sides lies, stalls or dies."""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store.running_server import (
    WAIT_S,
    foreign_server,
    make_certificates,
    running_server,
    wait_until,
    write_token,
)
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    bytes_of,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)
from store.server_process import ServerProcess
from store.tenants_file import TenantsFile
from store.test_shared import Calls

from tq_store.block import MAX_BLOCK_BYTES, BlockKind, payload_of, verify_block
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import RpcDenied, RpcError, RpcOverLimit, RpcTimeout, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.placed import PlacedBlock
from tq_store.results import GetOutcome
from tq_store.rpc import convert
from tq_store.rpc.connection import Connection
from tq_store.rpc.parcels import PARCEL_HEADER_BYTES, cut_parcels, parse_parcel_header
from tq_store.rpc.pipe import Pipe
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server import app as app_module
from tq_store.server import credentials as credentials_module
from tq_store.server import pipes as pipes_module
from tq_store.server import service as service_module
from tq_store.server.app import Server
from tq_store.server.pipe import Pipe as ServerPipe
from tq_store.server.pipes import Pipes
from tq_store.server.service import BlockStoreService

MIB = 1 << 20
PATIENT: dict[str, Any] = {"lookup_timeout_s": WAIT_S, "transfer_timeout_s": WAIT_S, "backoff_s": 0.01}
BLOCKS = sample_blocks(6, 300_000)
KEYS = keys_of(BLOCKS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[StoreClient]:
    with client_at(server.address) as opened:
        opened.put(BLOCKS)
        yield opened


def client_at(address: str, **settings: Any) -> StoreClient:
    return StoreClient(address, config=ClientConfig(**(PATIENT | settings)))


def got(client: StoreClient, keys: Sequence[BlockKey] = KEYS) -> list[bytes | None]:
    return [data for _, data in client.get(keys)]


def test_blocks_come_through_a_pipe_that_is_opened_once(client: StoreClient, calls: Calls) -> None:
    keys = [sample_key(99), *KEYS, sample_key(98), KEYS[0]]
    for _ in range(3):
        assert got(client, keys) == [None, *bytes_of(BLOCKS), None, BLOCKS[0][1]]
    assert calls.take() == ["OpenPipe", "GetPiped", "GetPiped", "GetPiped"]
    assert set(client.counters.values()) == {0}


@pytest.mark.parametrize("sizes", [[1], [70_000] * 40, [3 * MIB, 256, 5 * MIB + 1, 256]])
def test_blocks_of_all_sizes(client: StoreClient, sizes: list[int]) -> None:
    blocks = [sample_block(100 + number, size) for number, size in enumerate(sizes)]
    client.put(blocks)
    assert got(client, keys_of(blocks)) == bytes_of(blocks)
    assert client.counters["broken_pipes"] == 0


@pytest.mark.parametrize(("settings", "config"), [({"payload_pipes": 0}, {}), ({}, {"pipes": 0})])
def test_either_side_can_do_without(calls: Calls, settings: dict[str, Any], config: dict[str, Any]) -> None:
    with running_server(**settings) as server, client_at(server.address, **config) as client:
        client.put(BLOCKS)
        calls.take()
        for _ in range(2):
            assert got(client) == bytes_of(BLOCKS)
        assert [call for call in calls.take() if call != "OpenPipe"] == ["Get", "Get"]
        assert set(client.counters.values()) == {0}


def test_an_older_server_is_not_asked_again_and_again(calls: Calls) -> None:
    class Older(stubs.BlockStoreServicer):
        def Get(self, request: pb.Keys, context: object) -> Iterator[pb.BlockFrame]:
            for index, key in enumerate(request.keys):
                data = dict(BLOCKS)[BlockKey(key)]
                yield pb.BlockFrame(index=index, block_bytes=len(data), data=data)

    with foreign_server(Older()) as address, client_at(address) as client:
        for _ in range(3):
            assert got(client) == bytes_of(BLOCKS)
        assert calls.take() == ["OpenPipe", "Get", "Get", "Get"]
        assert set(client.counters.values()) == {0}


def test_a_server_that_has_no_pipe_left_streams(calls: Calls) -> None:
    with (
        running_server(payload_pipes=1) as server,
        client_at(server.address) as client,
        client_at(server.address) as other,
    ):
        client.put(BLOCKS)
        assert got(client) == bytes_of(BLOCKS)
        calls.take()
        for _ in range(2):
            assert got(other) == bytes_of(BLOCKS)
        assert calls.take() == ["OpenPipe", "Get", "Get"]


def test_a_port_that_cannot_be_reached_leaves_the_stream(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(BlockStoreService, "_open_pipe", _answering(closed.getsockname()[1], bytes(32)))
        with running_server() as server, client_at(server.address) as client:
            client.put(BLOCKS)
            calls.take()
            for _ in range(2):
                assert got(client) == bytes_of(BLOCKS)
            assert calls.take() == ["OpenPipe", "Get", "Get"]
            assert set(client.counters.values()) == {0}


def _answering(port: int, ticket: bytes) -> Callable[..., Any]:
    async def answer(*_: object) -> bytes:
        return pb.OpenPipeResponse(port=port, ticket=ticket).SerializeToString()

    return answer


@pytest.mark.parametrize(("port", "ticket"), [(70_000, bytes(32)), (1, b""), (1, bytes(33))])
def test_an_answer_that_makes_no_sense_leaves_the_stream(
    monkeypatch: pytest.MonkeyPatch, port: int, ticket: bytes
) -> None:
    monkeypatch.setattr(BlockStoreService, "_open_pipe", _answering(port, ticket))
    with running_server() as server, client_at(server.address) as client:
        client.put(BLOCKS)
        assert got(client) == bytes_of(BLOCKS)
        assert client.counters["failed_calls"] == 1


@pytest.mark.parametrize("answer", [b"", b"only some", b"and nothing more"])
def test_somebody_else_at_that_port_leaves_the_stream(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, answer: bytes
) -> None:
    """Who closes the connection, at once or too early, and who names a pipe that the server does not know."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setattr(BlockStoreService, "_open_pipe", _answering(stranger.getsockname()[1], bytes(32)))

        def serve() -> None:
            opened, _ = stranger.accept()
            with opened:
                assert opened.recv(32, socket.MSG_WAITALL) == bytes(32)
                opened.sendall(answer)
                if len(answer) == 16:
                    opened.recv(1)

        with (
            ThreadPoolExecutor(1) as pool,
            running_server() as server,
            client_at(server.address) as client,
        ):
            serving = pool.submit(serve)
            client.put(BLOCKS)
            calls.take()
            assert got(client) == bytes_of(BLOCKS)
            serving.result(WAIT_S)
            assert [call for call in calls.take() if call != "GetPiped"] == ["OpenPipe", "Get"]


def test_a_port_that_says_nothing_leaves_time_for_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(BlockStoreService, "_open_pipe", _answering(silent.getsockname()[1], bytes(32)))
        with running_server() as server, client_at(server.address, transfer_timeout_s=1.0) as client:
            client.put(BLOCKS)
            assert got(client) == bytes_of(BLOCKS)


@pytest.mark.parametrize("error", [EOFError(), ValueError(), OSError(), TimeoutError()])
def test_a_pipe_that_breaks_leaves_the_rest_to_a_stream_and_is_not_used_again(
    client: StoreClient, calls: Calls, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    receive, failures = Pipe.receive_block, iter([error])

    def failing(pipe: Pipe, call: int, index: int, timeout_s: float) -> bytes | None:
        if index == 2:
            for failure in failures:
                raise failure
        return receive(pipe, call, index, timeout_s)

    monkeypatch.setattr(Pipe, "receive_block", failing)
    assert got(client) == bytes_of(BLOCKS)
    assert got(client) == bytes_of(BLOCKS)
    assert calls.take() == ["OpenPipe", "GetPiped", "Get", "OpenPipe", "GetPiped"]
    assert client.counters["broken_pipes"] == 1
    assert client.counters["failed_calls"] == 0


@pytest.mark.parametrize(
    ("number", "first", "num_bytes"), [(1, 0, 0), (0, 1, 0), (0, 0, MAX_BLOCK_BYTES + 1), (0, 0, 2**32 - 1)]
)
def test_bytes_that_are_not_of_this_call_are_not_taken(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch, number: int, first: int, num_bytes: int
) -> None:
    """A server that writes for another call, or another block, or declares what no block has."""
    cut, lies = cut_parcels, iter([True])

    def lying(call: int, index: int, blocks: Sequence[bytes | None]) -> Iterator[Sequence[memoryview]]:
        for _ in lies:
            if num_bytes:
                header = memoryview(
                    call.to_bytes(8, "little") + index.to_bytes(4, "little") + num_bytes.to_bytes(4, "little")
                )
                return iter([[header]])
            return cut(call ^ number, index + first, blocks)
        return cut(call, index, blocks)

    monkeypatch.setattr(service_module, "cut_parcels", lying)
    assert got(client) == bytes_of(BLOCKS)
    assert client.counters["broken_pipes"] == 1
    assert got(client) == bytes_of(BLOCKS)
    assert client.counters["broken_pipes"] == 1


@pytest.mark.parametrize("error", [None, ValueError("no such pipe"), RuntimeError("a fault of the server's")])
def test_a_call_that_writes_nothing_leaves_the_stream(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, error: Exception | None
) -> None:
    async def silent(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(BlockStoreService, "_get_piped", silent)
    with running_server() as server, client_at(server.address) as client:
        client.put(BLOCKS)
        calls.take()
        assert got(client) == bytes_of(BLOCKS)
        assert calls.take() == ["OpenPipe", "GetPiped", "Get"]
        assert client.counters["failed_calls"] == (error is not None)


def test_a_call_that_fails_after_its_last_block_has_served_them(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BlockStoreService._get_piped

    async def failing(*arguments: Any) -> None:
        await original(*arguments)
        raise ValueError("too late")

    monkeypatch.setattr(BlockStoreService, "_get_piped", failing)
    with running_server() as server, client_at(server.address) as other:
        other.put(BLOCKS)
        for _ in range(2):
            assert got(other) == bytes_of(BLOCKS)
        assert not other._pipes._idle, "who knows what else there may be in it"


def test_a_bit_that_flips_on_the_way_is_a_miss(client: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = Pipe.receive_block
    for position in (0, 40, 255, 256, 300_000):

        def flipped(pipe: Pipe, call: int, index: int, timeout_s: float, at: int = position) -> bytes | None:
            data = bytearray(receive(pipe, call, index, timeout_s) or b"")
            if index == 1:
                data[at] ^= 1
            return bytes(data)

        monkeypatch.setattr(Pipe, "receive_block", flipped)
        assert got(client) == [BLOCKS[0][1], None, *bytes_of(BLOCKS[2:])]
    assert client.counters["rejected_blocks"] == 5


def test_a_reader_that_stops_early_leaves_nothing_for_the_next(client: StoreClient, calls: Calls) -> None:
    for number in range(3):
        reading = client.get(KEYS)
        assert next(reading) == (0, BLOCKS[0][1])
        reading.close()
        assert got(client, KEYS[number:]) == bytes_of(BLOCKS[number:])
    assert calls.take().count("OpenPipe") == 4, "a pipe in which there may be more is not used again"
    assert client.counters["broken_pipes"] == 0


def test_a_reader_that_does_not_ask_for_the_end_keeps_the_pipe(client: StoreClient, calls: Calls) -> None:
    for _ in range(3):
        reading = client.get(KEYS)
        assert [next(reading) for _ in KEYS] == list(enumerate(bytes_of(BLOCKS)))
        reading.close()
    assert calls.take() == ["OpenPipe", "GetPiped", "GetPiped", "GetPiped"]


def test_a_server_that_closes_idle_pipes_is_asked_for_another(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes_module, "_IDLE_S", 0.3)
    with running_server() as server, client_at(server.address) as client:
        client.put(BLOCKS)
        calls.take()
        assert got(client) == bytes_of(BLOCKS)
        (idle,) = client._pipes._idle
        wait_until(lambda: not idle.is_alive)
        assert got(client) == bytes_of(BLOCKS)
        assert calls.take() == ["OpenPipe", "GetPiped"] * 2
        assert set(client.counters.values()) == {0}


def test_threads_have_pipes_of_their_own_and_go_the_ordinary_way_beyond(server: Server, calls: Calls) -> None:
    with client_at(server.address, pipes=3) as client, ThreadPoolExecutor(8) as pool:
        client.put(BLOCKS)
        calls.take()
        for answer in pool.map(lambda _: got(client), range(80)):
            assert answer == bytes_of(BLOCKS)
        assert len(client._pipes._idle) <= 3
        assert set(client.counters.values()) == {0}
    assert calls.methods.count("OpenPipe") <= 3


def test_calls_of_several_connections_take_pipes_as_well(server: Server, calls: Calls) -> None:
    with client_at(server.address, connections=3) as client:
        client.put(BLOCKS)
        calls.take()
        for _ in range(5):
            assert got(client) == bytes_of(BLOCKS)
        assert "Get" not in calls.take()
        assert set(client.counters.values()) == {0}


def test_closing_a_client_ends_what_other_threads_wait_for(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert got(client) == bytes_of(BLOCKS)
    began = threading.Event()

    async def stuck(*_: object) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(ServerPipe, "write", stuck)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(got, client)
        assert began.wait(WAIT_S)
        client.close()
        with pytest.raises(RpcError):
            reading.result(WAIT_S)


def test_a_server_that_is_killed_and_started_again_is_used_again(calls: Calls) -> None:
    with ServerProcess() as server, client_at(server.address) as client:
        client.put(BLOCKS)
        reading = client.get(KEYS)
        assert next(reading) == (0, BLOCKS[0][1])
        server.send(signal.SIGKILL)
        server.end()
        with contextlib.suppress(RpcUnavailable):  # or what had left it before
            assert [data for _, data in reading] == bytes_of(BLOCKS[1:])
        with pytest.raises(RpcUnavailable):
            got(client)
        with ServerProcess(listen=server.address):
            wait_until(lambda: answers(client))
            client.put(BLOCKS)
            calls.take()
            assert got(client) == bytes_of(BLOCKS)
            assert calls.take() == ["OpenPipe", "GetPiped"]


def answers(client: StoreClient) -> bool:
    try:
        client.ping()
    except RpcUnavailable:
        return False
    return True


def test_a_call_in_flight_is_finished_before_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = sample_blocks(40, MIB)
    with ThreadPoolExecutor(1) as pool:
        with running_server(grace_s=WAIT_S) as server:
            client = client_at(server.address)
            client.put(blocks)
            reading = client.get(keys_of(blocks))
            next(reading)
            rest = pool.submit(lambda: [threading.Event().wait(0.005) or data for _, data in reading])
        assert rest.result(WAIT_S) == bytes_of(blocks[1:])
        assert client.counters["broken_pipes"] == 0
        wait_until(lambda: not any(pipe.is_alive for pipe in client._pipes._idle))
        client.close()


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hurry, while it keeps others from their share, and without them after a stall."""
    monkeypatch.setattr(service_module, "_STALL_S", 0.5)
    blocks = sample_blocks(12, 4 * MIB)
    with running_server() as server, client_at(server.address) as client:
        for block in blocks:
            client.put([block])
        reading = client.get(keys_of(blocks))
        next(reading)
        threading.Event().wait(1.0)
        # what the kernels hold is right; the rest is told as the server ends it
        for position in range(1, len(blocks)):
            try:
                assert next(reading) == (position, blocks[position][1])
            except RpcTimeout:
                break
        else:
            raise AssertionError("it was served to the end")
        assert client.counters["broken_pipes"] == 1
        assert got(client, keys_of(blocks[:2])) == bytes_of(blocks[:2])


def test_a_window_that_stays_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tq_store.server.app._PATIENCE_S", 0.2)
    monkeypatch.setattr(service_module, "_HURRY_S", 5.0)
    blocks = sample_blocks(8, 4 * MIB)
    with (
        running_server(max_outflight_bytes=4 * MIB) as server,
        client_at(server.address) as client,
        client_at(server.address) as slow,
    ):
        for block in blocks:
            client.put([block])
        reading = slow.get(keys_of(blocks))
        next(reading)
        with pytest.raises(RpcOverLimit, match="max_outflight"):
            got(client, keys_of(blocks))
        reading.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    make_certificates(directory)
    return directory


@pytest.mark.parametrize("is_mutual", [False, True])
def test_pipes_are_encrypted_where_grpc_is(files: Path, calls: Calls, is_mutual: bool) -> None:
    blocks = [*BLOCKS, sample_block(50, 5 * MIB)]
    served = {"tls_cert": files / "server.pem", "tls_key": files / "server.key", "payload_port": 0}
    shown: dict[str, Any] = {"tls_ca": files / "ca.pem"}
    if is_mutual:
        served["tls_client_ca"] = files / "ca.pem"
        shown |= {"tls_cert": files / "client.pem", "tls_key": files / "client.key"}
    with running_server(**served) as server, client_at(server.address, **shown) as client:
        client.put(blocks)
        calls.take()
        for _ in range(2):
            assert got(client, keys_of(blocks)) == bytes_of(blocks)
        payloads = [payload_of(data) for _, data in blocks]
        places = [memoryview(bytearray(len(payload))) for payload in payloads]
        placed = [
            PlacedBlock(key, BlockKind(verify_block(data)), [place[:70_000], place[70_000:]])
            for (key, data), place in zip(blocks, places, strict=True)
        ]
        assert list(client.get_into(keys_of(blocks), [placed])) == [[GetOutcome.FILLED] * len(blocks)]
        assert places == payloads
        assert calls.take() == ["OpenPipe", "GetPiped", "GetPiped", "GetPiped"]
        (pipe,) = client._pipes._idle
        assert pipe.is_alive
    assert not pipe.is_alive


@pytest.fixture
def encrypted(files: Path, tmp_path: Path) -> Iterator[tuple[Server, Pipes]]:
    """A server that demands certificates and a token, and its pipes."""
    made: list[Pipes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "Pipes", lambda **named: made.append(Pipes(**named)) or made[0])
        with running_server(
            tls_cert=files / "server.pem",
            tls_key=files / "server.key",
            tls_client_ca=files / "ca.pem",
            payload_port=0,
            token_file=write_token(tmp_path),
        ) as server:
            yield server, made[0]


def open_raw(server: Server, files: Path, tmp_path: Path) -> tuple[int, bytes]:
    """Port and ticket, as an authenticated call is told."""
    config = ClientConfig(
        tls_ca=files / "ca.pem",
        tls_cert=files / "client.pem",
        tls_key=files / "client.key",
        token_file=tmp_path / "token",
    )
    with contextlib.closing(Connection(server.address, config)) as connection:
        return connection.ask("OpenPipe", b"", convert.parse_opened_pipe, timeout_s=WAIT_S)


@pytest.mark.parametrize("shown", ["no TLS", "no certificate", "a certificate of nobody"])
def test_a_ticket_is_worth_nothing_without_what_grpc_demands(
    encrypted: tuple[Server, Pipes], files: Path, tmp_path: Path, shown: str
) -> None:
    server, pipes = encrypted
    port, ticket = open_raw(server, files, tmp_path)
    if shown == "no TLS":
        with socket.create_connection(("127.0.0.1", port), WAIT_S) as opened, contextlib.suppress(OSError):
            opened.sendall(ticket + bytes(1000))
            answer = opened.recv(100)
            assert len(answer) < 16, "an alert at most"
    else:
        context = ssl.create_default_context(cafile=files / "ca.pem")
        if shown == "a certificate of nobody":
            make_certificates(tmp_path)
            context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        with pytest.raises(OSError, match=r"."):
            Pipe("127.0.0.1", port, ticket, context=context, timeout_s=WAIT_S)
    assert len(pipes) == 0


def test_a_client_shows_its_ticket_to_nobody_but_its_server(
    encrypted: tuple[Server, Pipes], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's certificate, of an authority that the client does not trust."""
    server, _ = encrypted
    make_certificates(tmp_path)
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    impostor.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> bytes:
            opened, _ = listener.accept()
            with contextlib.suppress(OSError), impostor.wrap_socket(opened, server_side=True) as encrypted:
                return encrypted.recv(32)
            return b""

        serving = pool.submit(serve)
        port = listener.getsockname()[1]
        monkeypatch.setattr(convert, "parse_opened_pipe", lambda _: (port, b"t" * 32))
        config = {
            "tls_ca": files / "ca.pem",
            "tls_cert": files / "client.pem",
            "tls_key": files / "client.key",
            "token_file": tmp_path / "token",
        }
        with client_at(server.address, **config) as client:
            client.put(BLOCKS)
            assert got(client) == bytes_of(BLOCKS)
        assert serving.result(WAIT_S) == b""


@pytest.fixture
def tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TenantsFile:
    monkeypatch.setattr(credentials_module, "_POLL_S", 0.01)
    file = TenantsFile(tmp_path)
    file.add("a")
    file.add("b")
    return file


def test_a_pipe_is_of_no_use_to_another_tenant(tenants: TenantsFile, calls: Calls) -> None:
    with (
        running_server(tenants_file=tenants.path) as server,
        tenants.client(server.address, "a") as a,
        tenants.client(server.address, "b") as b,
    ):
        a.put(BLOCKS)
        assert got(a) == bytes_of(BLOCKS)
        assert got(b) == [None] * len(BLOCKS)
        (of_a,), (of_b,) = a._pipes._idle, b._pipes._idle
        of_b.name, of_a.name = of_a.name, of_b.name
        calls.take()
        assert got(b) == [None] * len(BLOCKS)
        assert got(a) == bytes_of(BLOCKS)
        assert calls.take() == ["GetPiped", "Get", "GetPiped", "Get"]
        assert got(a) == bytes_of(BLOCKS)


def test_a_pipe_follows_the_tokens_of_its_tenant(tenants: TenantsFile, calls: Calls) -> None:
    with running_server(tenants_file=tenants.path) as server, tenants.client(server.address, "a") as client:
        client.put(BLOCKS)
        assert got(client) == bytes_of(BLOCKS)
        first = tenants.tokens["a"]
        second = tenants.add("a")
        with tenants.client(server.address, "a") as other:
            wait_until(lambda: is_let_in(other))
            client._connection._token = other._connection._token
            calls.take()
            assert got(client) == bytes_of(BLOCKS)
            assert calls.take() == ["GetPiped"], "another token of the same tenant"
            tenants.drop_oldest_token("a")
            assert first != second
            with tenants.client(server.address, "a", token=first) as revoked:
                wait_until(lambda: not is_let_in(revoked))
                client._connection._token = revoked._connection._token
                with pytest.raises(RpcDenied):
                    got(client)


def is_let_in(client: StoreClient) -> bool:
    try:
        client.ping()
    except RpcDenied:
        return False
    return True


def test_what_a_tenant_may_not_read_is_refused_before_a_byte(tenants: TenantsFile) -> None:
    tenants.add("narrow", namespaces=[NAMESPACE.hex()])
    with (
        running_server(tenants_file=tenants.path) as server,
        tenants.client(server.address, "narrow") as client,
    ):
        client.put(BLOCKS)
        assert got(client) == bytes_of(BLOCKS)
        with pytest.raises(RpcDenied, match="may not use"):
            got(client, [sample_key(1, OTHER_NAMESPACE)])
        assert client.counters["broken_pipes"] == 0
        assert got(client) == bytes_of(BLOCKS)


def test_no_ticket_and_no_name_is_logged(
    client: StoreClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []
    parse = convert.parse_opened_pipe

    def noting(raw: bytes) -> tuple[int, bytes]:
        port, ticket = parse(raw)
        seen.append(ticket)
        return port, ticket

    monkeypatch.setattr(convert, "parse_opened_pipe", noting)
    assert got(client) == bytes_of(BLOCKS)
    (pipe,) = client._pipes._idle
    for secret in (seen[0], pipe.name):
        for shown in (secret.hex(), repr(secret)[2:-1]):
            assert shown not in caplog.text
    assert seen[0] not in repr(pipe).encode()


def test_a_slow_link_is_read_piece_by_piece() -> None:
    data, name = bytes(range(256)) * 1000, bytes(16)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            opened, _ = listener.accept()
            with opened:
                opened.recv(32, socket.MSG_WAITALL)
                (pieces,) = cut_parcels(5, 0, [data])
                sent = name + b"".join(pieces)
                for start in range(0, len(sent), 100_001):
                    opened.sendall(sent[start : start + 100_001])
                    threading.Event().wait(0.05)
                opened.recv(1)

        serving = pool.submit(serve)
        pipe = Pipe("127.0.0.1", listener.getsockname()[1], bytes(32), context=None, timeout_s=WAIT_S)
        with contextlib.closing(pipe):
            assert pipe.receive_block(5, 0, WAIT_S) == data
            with pytest.raises(TimeoutError):
                pipe.receive_block(5, 1, 0.0)
        serving.result(WAIT_S)


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize("pause_s", [0.02, WAIT_S])
def test_a_server_that_is_slow_or_silent_is_waited_for_until_the_deadline(
    files: Path, is_encrypted: bool, pause_s: float
) -> None:
    """However often a little of the block comes."""
    context, served = None, None
    if is_encrypted:
        context, served = (
            ssl.create_default_context(cafile=files / "ca.pem"),
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
        )
        served.load_cert_chain(files / "server.pem", files / "server.key")
        served.num_tickets = 0
    has_given_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            opened, _ = listener.accept()
            with served.wrap_socket(opened, server_side=True) if served else opened as end:
                end.recv(32)
                (pieces,) = cut_parcels(5, 0, [bytes(MIB)])
                sent = bytes(16) + b"".join(pieces)
                while sent and not has_given_up.is_set():
                    end.sendall(sent[:40])
                    sent = sent[40:]
                    has_given_up.wait(pause_s)

        serving = pool.submit(serve)
        port = listener.getsockname()[1]
        with contextlib.closing(
            Pipe("127.0.0.1", port, bytes(32), context=context, timeout_s=WAIT_S)
        ) as pipe:
            began = time.monotonic()
            with pytest.raises((TimeoutError, BlockingIOError)):
                pipe.receive_block(5, 0, 0.3)
            assert 0.25 < time.monotonic() - began < 2.0
            has_given_up.set()
            serving.result(WAIT_S)


def test_parcels_are_views_of_blocks_in_steps_of_a_mebibyte() -> None:
    blocks = [b"a" * 10, None, b"b" * (5 * MIB + 3), b"", *([b"c" * 100] * 5000)]
    steps = list(cut_parcels(2**64 - 1, 7, blocks))
    assert all(sum(map(len, step)) <= MIB + (16 << 10) for step in steps)
    assert all(len(step) <= 1024 for step in steps)
    stream = b"".join(itertools.chain.from_iterable(steps))
    for index, block in enumerate(blocks, 7):
        header, stream = stream[:PARCEL_HEADER_BYTES], stream[PARCEL_HEADER_BYTES:]
        assert parse_parcel_header(header, call=2**64 - 1, index=index) == len(block or b"")
        assert stream.startswith(block or b"")
        stream = stream[len(block or b"") :]
    assert not stream
