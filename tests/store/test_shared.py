"""Blocks through memory that client and server share, and what happens when one of them lies or dies."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store.running_server import TOKEN, WAIT_S, running_server, wait_until, write_token
from store.sample_blocks import bytes_of, keys_of, sample_block, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcDenied, RpcError, RpcUnavailable
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.rpc import shared as shared_module
from tq_store.rpc.connection import Connection
from tq_store.rpc.segment import SOCKET_SUFFIX, Segment
from tq_store.server.segments import Segment as ServerSegment
from tq_store.server.service import BlockStoreService

MIB = 1 << 20
STORED, PRESENT, INVALID = PutOutcome.STORED, PutOutcome.PRESENT, PutOutcome.INVALID
PATIENT: dict[str, Any] = {
    "lookup_timeout_s": WAIT_S,
    "transfer_timeout_s": WAIT_S,
    "backoff_s": 0.01,
    "shared_memory_bytes": 4 * MIB,
}


class Calls:
    """Notes which methods a client's connection was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.methods: list[str] = []
        for name in ("ask", "start", "receive", "send"):
            monkeypatch.setattr(Connection, name, self._noting(getattr(Connection, name)))

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(connection: Connection, method: str, *arguments: Any, **named: Any) -> Any:
            self.methods.append(method)
            return original(connection, method, *arguments, **named)

        return call

    def take(self) -> list[str]:
        taken, self.methods = self.methods, []
        return taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def client_at(path: Path, **settings: Any) -> StoreClient:
    return StoreClient(f"unix:{path}", config=ClientConfig(**(PATIENT | settings)))


@pytest.fixture
def client(path: Path) -> Iterator[StoreClient]:
    with running_server(local_socket=path), client_at(path) as opened:
        yield opened


def got(client: StoreClient, keys: Sequence[BlockKey]) -> list[bytes | None]:
    return [data for _, data in client.get(keys)]


def test_blocks_go_through_memory_and_back(client: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(20, 500_000)
    assert client.put(iter(blocks)) == [STORED] * 20
    assert client.put(blocks[:2]) == [PRESENT] * 2
    assert set(calls.take()) == {"PutShared"}
    keys = [sample_key(99), *keys_of(blocks), sample_key(98), blocks[0][0]]
    assert got(client, keys) == [None, *bytes_of(blocks), None, blocks[0][1]]
    assert len(calls.methods) > 2, "they do not fit the segment at once"
    assert set(calls.take()) == {"GetShared"}
    assert set(client.counters.values()) == {0}


def test_what_does_not_fit_the_segment_is_not_counted_as_found(client: StoreClient) -> None:
    blocks = sample_blocks(20, 500_000)
    client.put(blocks)
    assert got(client, keys_of(blocks)) == bytes_of(blocks)
    assert client.stats().counters["hits_memory"] == 20


def test_a_server_on_a_unix_socket_alone_has_it_too(path: Path, calls: Calls) -> None:
    with running_server(listen=f"unix:{path}"), client_at(path) as client:
        assert client.put([sample_block(1)]) == [STORED]
        assert got(client, [sample_block(1)[0]]) == [sample_block(1)[1]]
    assert calls.take() == ["PutShared", "GetShared"]
    assert not list(path.parent.iterdir())


def test_a_block_larger_than_the_segment_goes_as_a_stream(client: StoreClient, calls: Calls) -> None:
    blocks = [sample_block(1), sample_block(2, 5 * MIB), sample_block(3)]
    assert client.put(blocks) == [STORED] * 3
    assert calls.take() == ["PutShared", "Put"]
    assert got(client, keys_of(blocks)) == bytes_of(blocks)
    assert calls.take() == ["GetShared", "GetShared", "Get"]


@pytest.mark.parametrize(
    ("server", "config"), [({"shared_segments": 0}, {}), ({}, {"shared_memory_bytes": 0})]
)
def test_either_side_can_do_without(
    path: Path, calls: Calls, server: dict[str, Any], config: dict[str, Any]
) -> None:
    with running_server(local_socket=path, **server), client_at(path, **config) as client:
        assert client.put([sample_block(1)]) == [STORED]
        assert got(client, [sample_block(1)[0]]) == [sample_block(1)[1]]
    assert calls.take() == ["Put", "Get"]


def test_a_put_has_one_deadline_however_many_segments_it_fills(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_s: list[float] = []
    ask = Connection.ask

    def noting(connection: Connection, method: str, *arguments: Any, **named: Any) -> Any:
        left_s.append(named["timeout_s"])
        return ask(connection, method, *arguments, **named)

    monkeypatch.setattr(Connection, "ask", noting)
    assert client.put(sample_blocks(3, 3 * MIB)) == [STORED] * 3
    assert len(left_s) == 3
    assert WAIT_S > left_s[0] > left_s[1] > left_s[2] > 0


def test_a_memory_socket_that_says_nothing_leaves_time_for_the_stream(path: Path, calls: Calls) -> None:
    with (
        socket.socket(socket.AF_UNIX) as silent,
        running_server(local_socket=path, shared_segments=0),
        client_at(path, transfer_timeout_s=2.0) as client,
    ):
        silent.bind(f"{path}{SOCKET_SUFFIX}")
        silent.listen()
        assert client.put([sample_block(1)]) == [STORED]
    assert calls.take() == ["Put"]


def test_blocks_that_cannot_be_sound_are_not_sent(client: StoreClient, calls: Calls) -> None:
    good = sample_block(1)
    odd = [(sample_key(2), b""), (BlockKey(b"short"), good[1])]
    assert client.put([odd[0], good, odd[1], (sample_key(3), good[1])]) == [INVALID, STORED, INVALID, INVALID]
    assert calls.take() == ["PutShared"]


def test_a_source_of_blocks_that_fails_fails_the_put(client: StoreClient) -> None:
    def source() -> Iterator[tuple[BlockKey, bytes]]:
        yield sample_block(1)
        raise OSError("the engine is gone")

    with pytest.raises(RpcError, match="the engine is gone"):
        client.put(source())
    assert client.put([sample_block(1)]) == [STORED]


def test_many_threads_take_what_segments_there_are(client: StoreClient, calls: Calls) -> None:
    def use(first: int) -> bool:
        blocks = sample_blocks(20, 50_000, first=first)
        return client.put(blocks) == [STORED] * 20 and got(client, keys_of(blocks)) == bytes_of(blocks)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(0, 320, 20)))
    assert {"PutShared", "GetShared"} <= set(calls.methods)


def test_a_reader_that_stops_early_gives_its_segment_back(client: StoreClient, calls: Calls) -> None:
    blocks = sample_blocks(5)
    client.put(blocks)
    for _ in range(10):
        assert next(iter(client.get(keys_of(blocks)))) == (0, blocks[0][1])
    assert set(calls.take()) == {"PutShared", "GetShared"}


def test_a_token_is_asked_for_here_too(path: Path, tmp_path: Path) -> None:
    token = write_token(tmp_path)
    with running_server(local_socket=path, token_file=token):
        with client_at(path) as stranger:
            with pytest.raises(RpcDenied):
                stranger.put([sample_block(1)])
            with pytest.raises(RpcDenied):
                got(stranger, [sample_key(1)])
        with client_at(path, token_file=token) as friend:
            assert friend.put([sample_block(1)]) == [STORED]
    assert TOKEN in token.read_text()


def test_a_handle_that_is_not_known_gives_and_takes_nothing(client: StoreClient) -> None:
    block = sample_block(1)
    client.put([block])
    connection = client._connection
    for method, request in (
        ("GetShared", convert.pack_shared_get(bytes(16), [block[0]])),
        ("PutShared", convert.pack_shared_put(b"", [(block[0], len(block[1]))])),
    ):
        with pytest.raises(RpcError, match="no such segment"):
            connection.ask(method, request, bytes, timeout_s=WAIT_S)


def test_a_put_beyond_the_segment_is_refused(client: StoreClient) -> None:
    with client._segments.lend(WAIT_S) as segment:
        assert segment is not None
        beyond = convert.pack_shared_put(segment.handle, [(sample_key(1), segment.num_bytes + 1)])
        with pytest.raises(RpcError, match="outside a segment"):
            client._connection.ask("PutShared", beyond, bytes, timeout_s=WAIT_S)


def test_bytes_that_changed_on_the_way_are_a_miss(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit that may flip in the memory between the two: in the header, in the payload."""
    blocks = sample_blocks(3)
    client.put(blocks)
    read = Segment.read
    for position in (0, 40, 255, 256, 511):

        def flipped(segment: Segment, offset: int, num_bytes: int, at: int = position) -> bytes:
            data = bytearray(read(segment, offset, num_bytes))
            if offset == 512:
                data[at] ^= 1
            return bytes(data)

        monkeypatch.setattr(Segment, "read", flipped)
        assert got(client, keys_of(blocks)) == [blocks[0][1], None, blocks[2][1]]
    assert client.counters["rejected_blocks"] == 5


def test_bytes_that_changed_before_the_server_read_them_are_not_stored(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Segment.write
    monkeypatch.setattr(
        Segment, "write", lambda segment, offset, data: write(segment, offset, data[:-1] + b"?")
    )
    assert client.put([sample_block(1)]) == [INVALID]


@pytest.mark.parametrize("sizes_bytes", [[512, 512], [5 * MIB], [1 << 63]])
def test_a_server_that_answers_nonsense_is_asked_for_a_stream(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch, sizes_bytes: list[int]
) -> None:
    block = sample_block(1)
    client.put([block])

    async def nonsense(*_: object) -> bytes:
        return convert.pack_shared_sizes(sizes_bytes)

    monkeypatch.setattr(BlockStoreService, "_get_shared", nonsense)
    monkeypatch.setattr(shared_module, "_KEYS_PER_CALL", 1)
    with running_server(local_socket=Path(client.address.removeprefix("unix:") + "2")) as server:
        assert server.address
        with client_at(Path(client.address.removeprefix("unix:") + "2")) as other:
            other.put([block])
            assert got(other, [block[0]]) == [block[1]]
            assert other.counters["failed_calls"] == 1


def test_a_segment_that_cannot_be_written_leaves_the_stream(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    block = sample_block(1)
    client.put([block])

    async def fail(*_: object) -> None:
        raise ValueError("gone")

    monkeypatch.setattr(ServerSegment, "write", fail)
    assert got(client, [block[0]]) == [block[1]]
    assert calls.take() == ["PutShared", "GetShared", "Get"]


SERVE = [sys.executable, "-m", "tq_store", "serve", "--listen", "127.0.0.1:0", "--local-socket"]


def start_server(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([*SERVE, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "serves on" in process.stdout.readline()
    return process


def answers(client: StoreClient) -> bool:
    try:
        client.ping()
    except RpcUnavailable:
        return False
    return True


def end(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    process.send_signal(number)
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()


def test_a_server_that_is_killed_and_started_again_is_used_again(path: Path, calls: Calls) -> None:
    blocks = sample_blocks(4, 100_000)
    server = start_server(path)
    with client_at(path) as client:
        assert client.put(blocks) == [STORED] * 4
        reading = client.get(keys_of(blocks))
        assert next(reading) == (0, blocks[0][1])
        end(server, signal.SIGKILL)
        assert [data for _, data in reading] == bytes_of(blocks[1:]), "they were in the segment already"
        with pytest.raises(RpcUnavailable):
            got(client, keys_of(blocks))
        server = start_server(path)
        calls.take()
        wait_until(lambda: answers(client))
        assert client.put(blocks) == [STORED] * 4
        assert got(client, keys_of(blocks)) == bytes_of(blocks)
        assert set(calls.take()) - {"Ping"} <= {"PutShared", "GetShared", "Put", "Get"}
    end(server, signal.SIGTERM)
    assert not list(path.parent.iterdir())


def test_a_client_that_dies_leaves_nothing(path: Path) -> None:
    program = """if True:
        import sys
        from store.sample_blocks import sample_block
        from tq_store.client import StoreClient
        client = StoreClient(sys.argv[1])
        assert client.put([sample_block(1)])[0].name == "STORED"
        print("ready", flush=True)
        sys.stdin.read()
    """
    server = start_server(path)

    def open_memory() -> int:
        """Descriptors of it: the server's, and one that its map holds."""
        files = Path(f"/proc/{server.pid}/fd").iterdir()
        return sum("memfd:tq-store" in os.readlink(file) for file in files)

    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", program, f"unix:{path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        assert open_memory() == 2
        client.kill()
        client.wait(WAIT_S)
    wait_until(lambda: open_memory() == 0)
    end(server, signal.SIGTERM)


def test_a_socket_in_use_is_not_taken(path: Path) -> None:
    with (
        running_server(local_socket=path),
        pytest.raises(ConfigError, match="another process"),
        running_server(local_socket=path),
    ):
        pass


def test_closing_a_client_ends_what_other_threads_read(client: StoreClient) -> None:
    blocks = sample_blocks(3)
    client.put(blocks)
    reading = client.get(keys_of(blocks))
    next(reading)
    threading.Thread(target=client.close).run()
    assert [data for _, data in reading] == bytes_of(blocks[1:])
    with pytest.raises(RpcError):
        got(client, keys_of(blocks))
