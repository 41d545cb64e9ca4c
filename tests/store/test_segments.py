"""Shared memory as it is handed over: what the server takes, what it turns away, and what it lets go."""

import asyncio
import fcntl
import gc
import mmap
import os
import socket
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from store.running_server import WAIT_S, running_server

from tq_store.errors import ConfigError
from tq_store.rpc import segment as segment_module
from tq_store.rpc.segment import HANDLE_BYTES, SOCKET_SUFFIX, SegmentPool, required_seals
from tq_store.rpc.segment import Segment as ClientSegment
from tq_store.server import segments as segments_module
from tq_store.server.segments import Segment, Segments

BYTES = 1 << 20


@pytest.fixture
async def segments(tmp_path: Path) -> AsyncIterator[Segments]:
    opened = listening(tmp_path / f"s{SOCKET_SUFFIX}", limit=2)
    yield opened
    await opened.close()
    assert not list(tmp_path.iterdir())


def listening(path: Path, *, limit: int = 1) -> Segments:
    opened = Segments(path, limit=limit)
    opened.listen()
    return opened


def pool_of(tmp_path: Path, num_bytes: int = BYTES) -> SegmentPool:
    return SegmentPool(f"unix:{tmp_path / 's'}", num_bytes)


async def open_segment(tmp_path: Path) -> ClientSegment:
    return await asyncio.to_thread(ClientSegment, str(tmp_path / f"s{SOCKET_SUFFIX}"), BYTES)


async def until_there_are(segments: Segments, count: int) -> None:
    async with asyncio.timeout(20):
        while len(segments) != count:
            await asyncio.sleep(0.005)


def memfd(num_bytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


async def hand_over(tmp_path: Path, fds: list[int]) -> bytes:
    """What the server answers to these descriptors; they are closed."""

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(tmp_path / f"s{SOCKET_SUFFIX}"))
            if fds:
                socket.send_fds(connection, [b"\0"], fds)
            else:
                connection.send(b"\0")
            return connection.recv(HANDLE_BYTES)

    try:
        return await asyncio.to_thread(ask)
    finally:
        for fd in fds:
            os.close(fd)


async def test_both_sides_see_the_same_bytes(segments: Segments, tmp_path: Path) -> None:
    client = await open_segment(tmp_path)
    server = segments.find(client.handle)
    assert (client.num_bytes, server.num_bytes) == (BYTES, BYTES)
    for size in (5, BYTES - 7):  # on the event loop, and in a thread
        data = os.urandom(size)
        client.write(7, data)
        assert await server.read(7, [size]) == [data]
        await server.write(3, [data])
        assert client.read(3, size) == data
    assert client.is_alive
    client.close()
    await until_there_are(segments, 0)
    with pytest.raises(ValueError, match="no such segment"):
        segments.find(client.handle)


async def test_much_is_copied_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_MOST_THREADS", 3)
    pieces = [os.urandom(size) for size in (3 * BYTES, 1, 5 * BYTES, 7, 2 * BYTES, 4 * BYTES)]
    num_bytes = sum(map(len, pieces))
    fd = memfd(num_bytes + 9, required_seals())
    segment = Segment(fd)
    calling = set()
    memmove = segments_module.ctypes.memmove

    def noting(*copy: Any) -> None:
        calling.add(threading.get_ident())
        if len(calling) > 1:
            at_once.set()
        assert at_once.wait(WAIT_S)
        memmove(*copy)

    at_once = threading.Event()
    monkeypatch.setattr(segments_module.ctypes, "memmove", noting)
    await segment.write(9, pieces)
    assert len(calling) > 1
    assert await segment.read(9, [len(piece) for piece in pieces]) == pieces


async def test_who_is_cancelled_while_memory_is_written_waits_for_the_end() -> None:
    segment = Segment(memfd(64 * BYTES, required_seals()))
    writing = asyncio.create_task(segment.write(0, [b"x" * BYTES] * 64))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await segment.read(63 * BYTES, [BYTES]) == [b"x" * BYTES]


async def test_memory_stays_mapped_while_a_thread_may_write_it() -> None:
    """Whoever is cancelled twice waits no longer, and the client may have gone."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    gate, segment = threading.Event(), Segment(memfd(BYTES, required_seals()))
    busy = asyncio.get_running_loop().run_in_executor(None, gate.wait)
    mapped, writing = weakref.ref(segment), asyncio.create_task(segment.write(0, [b"x" * BYTES]))
    del segment
    for _ in range(2):
        await asyncio.sleep(0)
        writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    del writing
    await asyncio.sleep(0)
    was_mapped = mapped() is not None
    gate.set()
    await busy
    assert was_mapped
    await asyncio.to_thread(bool)  # runs after the copy, in the one thread there is
    gc.collect()
    assert mapped() is None


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, BYTES + 1), (BYTES, 1), (BYTES - 1, 2)])
async def test_nothing_outside_is_touched(segments: Segments, tmp_path: Path, offset: int, size: int) -> None:
    client = await open_segment(tmp_path)
    server = segments.find(client.handle)
    with pytest.raises(ValueError, match="outside a segment"):
        await server.read(offset, [size])
    with pytest.raises(ValueError, match="outside a segment"):
        await server.write(offset, [bytes(size)])
    client.close()


async def test_what_is_no_sealed_memory_is_turned_away(segments: Segments, tmp_path: Path) -> None:
    seals = required_seals()
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(BYTES))
    odd: list[list[int]] = [
        [],
        [memfd(BYTES, seals), memfd(BYTES, seals)],
        [memfd(BYTES, seals & ~fcntl.F_SEAL_SHRINK)],
        [memfd(BYTES, seals & ~fcntl.F_SEAL_SEAL)],
        [memfd(0, seals)],
        [memfd((1 << 30) + 1, seals)],
        [os.open(plain, os.O_RDWR)],
        list(os.pipe())[:1],
    ]
    for fds in odd:
        assert await hand_over(tmp_path, fds) == b""
    plain.unlink()
    assert len(await hand_over(tmp_path, [memfd(BYTES, seals)])) == HANDLE_BYTES
    await until_there_are(segments, 0)


async def test_who_says_nothing_is_not_waited_for(
    segments: Segments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "_HELLO_S", 0.01)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(20)
        await asyncio.to_thread(silent.connect, str(tmp_path / f"s{SOCKET_SUFFIX}"))
        assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_more_than_the_limit_are_turned_away(segments: Segments, tmp_path: Path) -> None:
    one, two = await open_segment(tmp_path), await open_segment(tmp_path)
    with pytest.raises(ConnectionRefusedError):
        await open_segment(tmp_path)
    assert len(segments) == 2
    one.close()
    two.close()
    await until_there_are(segments, 0)


def test_memory_that_cannot_be_written_is_not_taken() -> None:
    fd = memfd(BYTES, required_seals())
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    with pytest.raises(PermissionError):
        Segment(read_only)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_only)


def test_memory_in_huge_pages_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = memfd(BYTES, required_seals())
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bsize=2 << 20))
    with pytest.raises(ValueError, match="not memory in pages of"):
        Segment(fd)


async def test_pages_that_a_client_takes_away_come_back_empty() -> None:
    fd = memfd(BYTES, required_seals())
    segment = Segment(os.dup(fd))
    await segment.write(0, [b"x" * BYTES])
    with mmap.mmap(fd, BYTES) as own:
        own.madvise(mmap.MADV_REMOVE)
    assert await segment.read(0, [BYTES]) == [bytes(BYTES)]
    await segment.write(BYTES - 1, [b"y"])
    assert os.pread(fd, BYTES, 0) == bytes(BYTES - 1) + b"y"
    os.close(fd)


async def test_a_copy_under_way_outlives_its_segment(segments: Segments, tmp_path: Path) -> None:
    client = await open_segment(tmp_path)
    client.write(0, b"x" * BYTES)
    server = segments.find(client.handle)
    reading = asyncio.create_task(server.read(0, [BYTES]))
    await asyncio.sleep(0)
    client.close()
    await until_there_are(segments, 0)
    assert await reading == [b"x" * BYTES]


def test_a_pool_reuses_what_comes_back_sound(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    with running_server(local_socket=tmp_path / "s"):
        with pool.lend(WAIT_S) as first:
            assert first is not None
        with pool.lend(WAIT_S) as again:
            assert again is first
        broken = pool.lend(WAIT_S)
        assert broken.__enter__() is first
        assert not broken.__exit__(ArithmeticError, ArithmeticError(), None)
        with pool.lend(WAIT_S) as fresh:
            assert fresh is not None
            assert fresh is not first
            pool.close()
        with pool.lend(WAIT_S) as none:
            assert none is None


def test_a_pool_notices_that_the_server_was_started_again(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    with running_server(local_socket=tmp_path / "s"), pool.lend(WAIT_S) as first:
        assert first is not None
    assert not first.is_alive
    with running_server(local_socket=tmp_path / "s"), pool.lend(WAIT_S) as second:
        assert second is not None
        assert second is not first
        assert second.is_alive
    pool.close()


def test_a_pool_lends_no_more_than_eight_and_rests_after_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(tmp_path)
    with running_server(local_socket=tmp_path / "s"), ExitStack() as stack:
        lent = [stack.enter_context(pool.lend(WAIT_S)) for _ in range(9)]
        assert [segment is None for segment in lent] == [False] * 8 + [True]
    with pool.lend(WAIT_S) as none:
        assert none is None
    with running_server(local_socket=tmp_path / "s"):
        with pool.lend(WAIT_S) as still_none:
            assert still_none is None, "it was refused a moment ago"
        monkeypatch.setattr(segment_module.time, "monotonic", lambda: 1e12)
        with pool.lend(WAIT_S) as found:
            assert found is not None
    pool.close()


def test_a_pool_has_sixteen_at_most_with_those_that_come_back_later(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    with running_server(local_socket=tmp_path / "s"):
        taken = [segment for _ in range(17) if (segment := pool.take(WAIT_S)) is not None]
        assert len(taken) == 16
        pool.put_back(taken.pop(), is_sound=True)
        pool.put_back(taken.pop(), is_sound=False)
        taken += [segment for _ in range(3) if (segment := pool.take(WAIT_S)) is not None]
        assert len(taken) == 16
        for segment in taken:
            pool.put_back(segment, is_sound=True)
    pool.close()


@pytest.mark.parametrize(
    ("address", "num_bytes"), [("127.0.0.1:7437", BYTES), ("unix:/nowhere/s", BYTES), ("unix:/nowhere/s", 0)]
)
def test_elsewhere_there_is_nothing_to_lend(address: str, num_bytes: int) -> None:
    with SegmentPool(address, num_bytes).lend(WAIT_S) as segment:
        assert segment is None


async def test_a_socket_that_cannot_be_had_is_a_setting_to_change(tmp_path: Path) -> None:
    opened = Segments(tmp_path / "not there" / "s", limit=1)
    with pytest.raises(ConfigError, match="cannot take shared memory"):
        opened.listen()
    await opened.close()
    folder = tmp_path / f"s{SOCKET_SUFFIX}"
    folder.mkdir()
    with (
        pytest.raises(ConfigError, match="cannot take shared memory"),
        running_server(local_socket=tmp_path / "s"),
    ):
        pass
    folder.rmdir()
    with (
        running_server(local_socket=tmp_path / "s"),
        closing(pool_of(tmp_path)) as pool,
        pool.lend(WAIT_S) as segment,
    ):
        assert segment is not None


async def test_what_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / f"s{SOCKET_SUFFIX}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    opened = listening(path)
    client = await open_segment(tmp_path)
    assert client.num_bytes <= segment_module.MAX_SEGMENT_BYTES
    client.close()
    await opened.close()


async def test_a_server_that_ends_leaves_the_socket_of_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / f"s{SOCKET_SUFFIX}"
    ending, never_began = listening(path), Segments(path, limit=1)
    following = listening(path)
    await ending.close()
    await never_began.close()
    client = await open_segment(tmp_path)
    assert following.find(client.handle).num_bytes == BYTES
    client.close()
    await following.close()
    assert not path.exists()


async def test_clients_that_only_connect_are_bounded(segments: Segments, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(segments_module, "_WAITING", 2)
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(10)]
        for each in idle:
            each.setblocking(False)
            await loop.sock_connect(each, str(tmp_path / f"s{SOCKET_SUFFIX}"))
        async with asyncio.timeout(5):
            assert await loop.sock_recv(idle[-1], 1) == b""  # turned away at once


async def test_a_server_out_of_files_lets_clients_in_later(
    segments: Segments, tmp_path: Path, monkeypatch, caplog
) -> None:
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, iter([OSError(24, "Too many open files")])

    async def failing(listener):
        for error in failures:
            raise error
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", failing)
    for _ in range(2):  # the first one is let in by the call that waits already
        client = await open_segment(tmp_path)
        client.close()
    assert "cannot be let in" in caplog.text
