"""The port on which pipes are opened: who is let in, for how long, and what a call may do with a pipe."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import pytest
from store.running_server import WAIT_S, running_server

from tq_store.errors import ConfigError
from tq_store.rpc.limits import PIPE_NAME_BYTES, TICKET_BYTES
from tq_store.server import pipes as pipes_module
from tq_store.server.pipe import Patience, Pipe, run
from tq_store.server.pipes import Pipes
from tq_store.server.tenants import SOLE_TENANT, Tenant

A, B = Tenant(name="a"), Tenant(name="b")


class Port:
    """Pipes, and clients of theirs that are nothing but sockets."""

    def __init__(self, limit: int = 4) -> None:
        self.denied = 0
        self.pipes = Pipes(limit=limit, tls=None, on_denied=self._deny)
        self.pipes.listen("127.0.0.1", 0)
        self._sockets = ExitStack()

    def _deny(self) -> None:
        self.denied += 1

    def connect(self) -> socket.socket:
        opened = self._sockets.enter_context(socket.create_connection(("127.0.0.1", self.pipes.port)))
        opened.setblocking(False)
        return opened

    async def show(self, ticket: bytes) -> tuple[socket.socket, bytes]:
        """A connection that begins like this, and what it is answered."""
        opened = self.connect()
        await asyncio.get_running_loop().sock_sendall(opened, ticket)
        return opened, await answer(opened)

    async def open(self, tenant: Tenant = SOLE_TENANT) -> tuple[socket.socket, bytes]:
        """A pipe: its client's end and its name."""
        ticket = self.pipes.ticket(tenant)
        assert ticket is not None
        opened, name = await self.show(ticket)
        assert len(name) == PIPE_NAME_BYTES
        return opened, name

    async def until_there_are(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.pipes) != count:
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        await self.pipes.close()
        self._sockets.close()


async def answer(opened: socket.socket, num_bytes: int = PIPE_NAME_BYTES) -> bytes:
    """What comes, up to so many bytes or the end of the connection."""
    received = b""
    async with asyncio.timeout(WAIT_S):
        while len(received) < num_bytes:
            try:
                more = await asyncio.get_running_loop().sock_recv(opened, num_bytes - len(received))
            except ConnectionResetError:
                return received
            if not more:
                return received
            received += more
    return received


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    opened = Port()
    yield opened
    await opened.close()


async def test_a_ticket_opens_one_pipe(port: Port) -> None:
    ticket = port.pipes.ticket(SOLE_TENANT)
    other = port.pipes.ticket(SOLE_TENANT)
    assert ticket is not None
    assert other is not None
    assert len(ticket) == TICKET_BYTES
    assert ticket != other
    _, name = await port.show(ticket)
    assert len(name) == PIPE_NAME_BYTES
    assert len(port.pipes) == 1
    assert (await port.show(ticket))[1] == b"", "it was shown before"
    assert (await port.show(other))[1] not in (b"", name)
    assert port.denied == 1


async def test_who_has_no_ticket_is_turned_away_without_an_answer(port: Port) -> None:
    assert await answer(port.connect()) == b"", "nobody is due"
    port.pipes.ticket(SOLE_TENANT)
    assert (await port.show(bytes(TICKET_BYTES)))[1] == b""
    assert (await port.show(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100))[1] == b""
    assert port.denied == 2
    assert len(port.pipes) == 0


async def test_a_ticket_that_ends_early_opens_nothing(port: Port) -> None:
    ticket = port.pipes.ticket(SOLE_TENANT)
    assert ticket is not None
    opened = port.connect()
    opened.send(ticket[:-1])
    opened.shutdown(socket.SHUT_WR)
    assert await answer(opened) == b""
    assert port.denied == 1
    assert len((await port.show(ticket))[1]) == PIPE_NAME_BYTES


async def test_a_late_ticket_opens_nothing(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes_module, "TICKET_LIFE_S", 0.05)
    late = port.pipes.ticket(SOLE_TENANT)
    assert late is not None
    monkeypatch.undo()
    assert port.pipes.ticket(SOLE_TENANT) is not None, "so that the port takes connections"
    opened = port.connect()
    await asyncio.sleep(0.06)
    await asyncio.get_running_loop().sock_sendall(opened, late)
    assert await answer(opened) == b""
    assert port.denied == 1


async def test_late_tickets_make_room_for_others(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes_module, "TICKET_LIFE_S", 0.0)
    assert all(port.pipes.ticket(SOLE_TENANT) for _ in range(20))


async def test_who_says_nothing_is_not_waited_for(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes_module, "_HELLO_S", 0.05)
    ticket = port.pipes.ticket(SOLE_TENANT)
    assert ticket is not None
    opened = port.connect()
    opened.send(ticket[:5])
    assert await answer(opened) == b""
    assert port.denied == 1


async def test_few_are_greeted_at_once(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes_module, "_GREETING", 1)
    ticket = port.pipes.ticket(SOLE_TENANT)
    assert ticket is not None
    silent = port.connect()
    assert (await port.show(ticket))[1] == b"", "another one is on its way"
    assert port.denied == 0
    silent.close()
    async with asyncio.timeout(WAIT_S):
        while not (await port.show(ticket))[1]:
            pass


async def test_pipes_are_limited_in_number(port: Port) -> None:
    ends = [(await port.open())[0] for _ in range(3)]
    assert port.pipes.ticket(SOLE_TENANT) is not None
    assert port.pipes.ticket(SOLE_TENANT) is None, "a ticket counts as the pipe that it opens"
    ends[0].close()
    await port.until_there_are(2)
    async with asyncio.timeout(WAIT_S):
        while port.pipes.ticket(SOLE_TENANT) is None:
            await asyncio.sleep(0)


async def test_one_tenant_leaves_room_for_others(port: Port) -> None:
    assert [bool(port.pipes.ticket(A)) for _ in range(3)] == [True, True, False]
    assert [bool(port.pipes.ticket(B)) for _ in range(3)] == [True, True, False]


async def test_a_pipe_is_its_tenants(port: Port) -> None:
    _, name = await port.open(A)
    for tenant, its_name in ((B, name), (SOLE_TENANT, name), (A, bytes(PIPE_NAME_BYTES)), (A, b"")):
        with pytest.raises(ValueError, match="no such pipe"), port.pipes.lend(its_name, tenant):
            pass
    with port.pipes.lend(name, A):
        pass


async def test_one_call_at_a_time_writes(port: Port) -> None:
    end, name = await port.open()
    with port.pipes.lend(name, SOLE_TENANT) as pipe:
        with pytest.raises(ValueError, match="another call"), port.pipes.lend(name, SOLE_TENANT):
            pass
        await pipe.write([memoryview(b"one"), memoryview(b"two")])
    assert await answer(end, 6) == b"onetwo"
    with port.pipes.lend(name, SOLE_TENANT) as pipe:
        await pipe.write([memoryview(b"three")])
    assert await answer(end, 5) == b"three"


async def test_a_call_that_fails_takes_the_pipe_with_it(port: Port) -> None:
    end, name = await port.open()
    with suppress(RuntimeError), port.pipes.lend(name, SOLE_TENANT) as pipe:
        await pipe.write([memoryview(b"half")])
        raise RuntimeError
    with pytest.raises(ValueError, match="no such pipe"), port.pipes.lend(name, SOLE_TENANT):
        pass
    assert await answer(end) == b"half"
    await port.until_there_are(0)


async def test_a_client_that_speaks_loses_its_pipe(port: Port) -> None:
    end, _ = await port.open()
    end.send(b"?")
    assert await answer(end) == b""
    await port.until_there_are(0)


async def test_an_idle_pipe_is_closed_and_a_busy_one_is_not(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes_module, "_IDLE_S", 0.3)
    end, name = await port.open()
    with port.pipes.lend(name, SOLE_TENANT) as pipe:
        other, _ = await port.open()
        assert await answer(other) == b""
        await asyncio.sleep(0.4)
        await pipe.write([memoryview(b"still")])
    assert await answer(end, 5) == b"still"
    assert await answer(end) == b""


@pytest.mark.parametrize("threads", [1, 2])
async def test_bytes_go_as_fast_as_they_are_taken(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """From the event loop, and from threads where there are processors for them."""
    monkeypatch.setattr(pipes_module, "_THREADS", threads)
    data = bytes(range(256)) * (64 << 10)
    port = Port()
    try:
        end, name = await port.open()
        with port.pipes.lend(name, SOLE_TENANT) as pipe:
            pieces = [memoryview(data[start : start + 999_983]) for start in range(0, len(data), 999_983)]
            writing = asyncio.create_task(write_all(pipe, pieces))
            assert await answer(end, len(data)) == data
            await writing
    finally:
        await port.close()


async def write_for_ever(port: Port, name: bytes, patience: Patience = nullcontext) -> None:
    with port.pipes.lend(name, SOLE_TENANT) as pipe:
        while True:
            await pipe.write([memoryview(bytes(1 << 20))], patience)


async def write_all(pipe: Pipe, pieces: list[memoryview]) -> None:
    for piece in pieces:
        await pipe.write([piece[:100], piece[100:]])


async def test_a_client_that_takes_a_little_now_and_then_is_given_up(port: Port) -> None:
    """The patience is for the whole step: otherwise it would hold its share of the window for ever."""
    end, name = await port.open()
    port.pipes._pipes[name]._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
    is_over = False

    async def sip() -> None:
        while not is_over:
            with suppress(BlockingIOError):
                end.recv(16 << 10)
            await asyncio.sleep(0.02)

    sipping, began = asyncio.create_task(sip()), time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await write_for_ever(port, name, lambda: asyncio.timeout(0.3))
        assert time.monotonic() - began < WAIT_S / 2
        await port.until_there_are(0)
    finally:
        is_over = True
        await sipping


async def test_a_call_is_told_that_the_client_has_gone(port: Port) -> None:
    end, name = await port.open()
    end.close()
    with pytest.raises(ValueError, match="has closed the pipe"):
        await write_for_ever(port, name)
    await port.until_there_are(0)


async def test_a_call_that_waits_can_be_cancelled(port: Port) -> None:
    end, name = await port.open()

    calling = asyncio.create_task(write_for_ever(port, name))
    await answer(end, 1 << 20)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await port.until_there_are(0)


async def test_closing_waits_for_calls_that_write() -> None:
    port = Port()
    end, name = await port.open()

    calling = asyncio.create_task(write_for_ever(port, name))
    await answer(end, 1 << 20)
    await port.close()
    with pytest.raises(ValueError, match="has closed"):
        await calling
    assert len(port.pipes) == 0


async def test_a_client_that_has_gone_before_it_has_its_name_leaves_nothing(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise ValueError("the client has closed the pipe")

    monkeypatch.setattr(Pipe, "write", gone)
    ticket = port.pipes.ticket(SOLE_TENANT)
    assert ticket is not None
    assert (await port.show(ticket))[1] == b""
    await port.until_there_are(0)


async def test_a_caller_that_is_cancelled_waits_for_its_thread() -> None:
    """It may still read from memory of the caller's."""
    began, may_end = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(WAIT_S)

    with ThreadPoolExecutor(1) as threads:
        running = asyncio.create_task(run(threads, work))
        await asyncio.to_thread(began.wait, WAIT_S)
        running.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not running.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_a_port_in_use_is_refused(port: Port) -> None:
    other = Pipes(limit=1, tls=None, on_denied=lambda: None)
    with pytest.raises(ConfigError, match=r"cannot take pipes on 127\.0\.0\.1"):
        other.listen("127.0.0.1", port.pipes.port)
    await other.close()


async def test_every_address_of_a_host_is_listened_on() -> None:
    pipes = Pipes(limit=1, tls=None, on_denied=lambda: None)
    pipes.listen("localhost", 0)
    for family, _, _, _, address in socket.getaddrinfo("localhost", pipes.port, type=socket.SOCK_STREAM):
        with socket.socket(family) as opened:
            opened.connect(address)
    await pipes.close()


async def test_addresses_that_this_host_has_not_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` names one of IPv6 where there is no such network."""
    names = {"both": ["192.0.2.1", "127.0.0.1"], "none": ["192.0.2.1"]}

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    pipes = Pipes(limit=1, tls=None, on_denied=lambda: None)
    try:
        with pytest.raises(ConfigError, match="cannot take pipes on none:0"):
            pipes.listen("none", 0)
        pipes.listen("both", 0)
        with socket.socket() as opened:
            opened.connect(("127.0.0.1", pipes.port))
    finally:
        await pipes.close()


async def test_a_host_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    pipes = Pipes(limit=1, tls=None, on_denied=lambda: None)
    with pytest.raises(ConfigError, match="cannot take pipes on nowhere:0: unknown"):
        pipes.listen("nowhere", 0)
    await pipes.close()


async def test_every_address_of_ipv6_takes_those_of_ipv4_as_well() -> None:
    pipes = Pipes(limit=1, tls=None, on_denied=lambda: None)
    pipes.listen("::", 0)
    for host in ("::1", "127.0.0.1"):
        with socket.create_connection((host, pipes.port)):
            pass
    await pipes.close()


async def test_files_that_run_out_are_waited_for(
    port: Port, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipes_module, "_REST_S", 0.001)
    accept, failures = asyncio.get_running_loop().sock_accept, iter([OSError("too many open files")])

    async def failing(listener: socket.socket) -> Any:
        for failure in failures:
            raise failure
        return await accept(listener)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", failing)
    connected = port.connect()
    assert await answer(connected) == b""
    await port.open()
    await port.open()
    assert "too many open files" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"payload_port": 0}])
def test_a_server_of_this_machine_picks_a_port(settings: dict[str, Any]) -> None:
    with running_server(**settings) as server:
        assert server.address


def test_a_server_whose_pipe_port_is_taken_does_not_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot take pipes"), running_server(payload_port=taken_port):
            pass
