"""The reader of Redis replies: any replies, cut anywhere, and anything that is none."""

import asyncio
import ctypes
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis._parsers import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, MovedError, ResponseError

from tq_store.backends.redis_reader import _INBOX_BYTES, Inbox, ReplyReader
from tq_store.backends.used_values import UsedValues
from tq_store.block import MAX_BLOCK_BYTES

MIB = 1 << 20


class Transport:
    """What an inbox needs of one."""

    def __init__(self, *, is_encrypted: bool = False) -> None:
        self.behind = asyncio.Protocol()
        self.is_aborted = False
        self.low_waters: list[int] = []
        self._extra = {"socket": self, "sslcontext": object() if is_encrypted else None}

    def get_extra_info(self, name: str) -> Any:
        return self._extra[name]

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        self.low_waters.append(value)

    def get_protocol(self) -> asyncio.Protocol:
        return self.behind

    def abort(self) -> None:
        self.is_aborted = True


def new_inbox() -> tuple[Inbox, Transport]:
    transport = Transport()
    return Inbox(transport, parse_error=BaseParser.parse_error, used=UsedValues()), transport


def feed(inbox: Inbox, data: bytes, piece_bytes: int = 1 << 20) -> None:
    """As a transport does: no more at once than there is room for, and than the socket has."""
    while data:
        # it holds the room until it asks for more, as a transport does
        room = inbox.get_buffer(-1)
        taken = min(len(room), piece_bytes, len(data))
        assert taken
        room[:taken] = data[:taken]
        inbox.buffer_updated(taken)
        data = data[taken:]


def test_a_large_value_is_read_in_few_turns() -> None:
    inbox, transport = new_inbox()
    feed(inbox, b"$%d\r\n" % (5 * MIB // 2))
    assert transport.low_waters == [MIB]
    feed(inbox, bytes(MIB), MIB)
    assert transport.low_waters == [MIB], "so much is still to come"
    feed(inbox, bytes(MIB), MIB)
    assert transport.low_waters == [MIB, MIB // 2]
    feed(inbox, bytes(MIB // 2) + b"\r\n:1\r\n", MIB)
    assert transport.low_waters == [MIB, MIB // 2, 1]
    assert read(inbox, 2) == [bytes(5 * MIB // 2), 1]
    transport = Transport(is_encrypted=True)
    feed(
        Inbox(transport, parse_error=BaseParser.parse_error, used=UsedValues()),
        b"$%d\r\n" % MIB + bytes(MIB) + b"\r\n",
    )
    assert transport.low_waters == []


def read(inbox: Inbox, count: int) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return [await inbox.next_reply() for _ in range(count)]

    return asyncio.run(all_of_them())


def real(reply: Any) -> Any:
    """A drawn reply with its large values, which are drawn as their lengths in text."""
    if isinstance(reply, str):
        return b"v" * int(reply)
    return [real(item) for item in reply] if isinstance(reply, list) else reply


def written(reply: Any) -> bytes:
    """A reply as a server writes it."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n" % len(reply) + b"".join(map(written, reply))


values = st.binary(max_size=40) | st.sampled_from([b"\r\n", b"$5\r\n", "70000", "200000"])
replies = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | values,
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(drawn=st.lists(replies, max_size=8), piece_bytes=st.sampled_from([1000, 65_536, 1 << 20]))
def test_replies_are_read_as_they_were_written(drawn: list[Any], piece_bytes: int) -> None:
    sent = real(drawn)
    inbox, transport = new_inbox()
    feed(inbox, b"".join(map(written, sent)), piece_bytes)
    assert read(inbox, len(sent)) == sent
    assert not inbox.is_dirty
    assert not transport.is_aborted


@settings(deadline=None)
@given(drawn=st.lists(replies, max_size=8), piece_bytes=st.sampled_from([1, 2, 7]))
def test_replies_are_the_same_however_they_arrive(drawn: list[Any], piece_bytes: int) -> None:
    data = b"".join(map(written, real(drawn)))[:3000]
    pieces, whole = new_inbox()[0], new_inbox()[0]
    feed(pieces, data, piece_bytes)
    feed(whole, data)
    assert pieces._replies == whole._replies


def test_words_and_errors() -> None:
    inbox, _ = new_inbox()
    feed(inbox, b"+OK\r\n-MOVED 42 10.0.0.1:7000\r\n*2\r\n-ERR no\r\n:1\r\n*-1\r\n*0\r\n")
    word, moved, array, nothing, empty = read(inbox, 5)
    assert word == b"OK"
    assert isinstance(moved, MovedError)
    assert (moved.host, moved.port) == ("10.0.0.1", 7000)
    assert isinstance(array[0], ResponseError)
    assert array[1] == 1
    assert (nothing, empty) == (None, [])


def test_a_large_value_is_not_copied() -> None:
    inbox, _ = new_inbox()
    feed(inbox, b"$1000000\r\n")
    where = ctypes.addressof(ctypes.c_char.from_buffer(inbox.get_buffer(-1)))
    feed(inbox, b"v" * 1_000_000 + b"\r\n:7\r\n")
    value, number = read(inbox, 2)
    assert (value, number) == (b"v" * 1_000_000, 7)
    assert id(value) + bytes.__basicsize__ - 1 == where, "the socket's bytes went into this very object"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "it starts with b'H'"),
        (b"\r\n", "it starts with b''"),
        (b":one\r\n", "invalid literal"),
        (b"$\r\n", "invalid literal"),
        (b"$-2\r\n", "a value of -2 bytes"),
        (b"$%d\r\n" % (2 * MAX_BLOCK_BYTES + 1), "a value of 536871425 bytes"),
        (b"*1048577\r\n", "an array of 1048577 items"),
        (b"*-2\r\n", "an array of -2 items"),
        (b"+" + b"x" * (_INBOX_BYTES - 1), "a line without an end"),
    ],
)
def test_what_is_no_reply_ends_the_connection(data: bytes, complaint: str) -> None:
    inbox, transport = new_inbox()
    feed(inbox, b":1\r\n")
    feed(inbox, data)
    assert transport.is_aborted
    assert read(inbox, 1) == [1], "what came before it counts"
    with pytest.raises(InvalidResponse, match=complaint):
        read(inbox, 1)


@settings(deadline=None)
@given(data=st.binary(max_size=300))
def test_anything_at_all_is_a_reply_or_the_end(data: bytes) -> None:
    inbox, transport = new_inbox()
    for start in range(0, len(data), 7):
        if not transport.is_aborted:
            feed(inbox, data[start : start + 7])
    assert transport.is_aborted == isinstance(inbox.failure, InvalidResponse)


async def test_the_end_is_told_to_whoever_waits() -> None:
    inbox, _ = new_inbox()
    waiting = asyncio.create_task(inbox.next_reply())
    await asyncio.sleep(0)
    feed(inbox, b"$10\r\nhalf")
    assert inbox.eof_received() is False
    with pytest.raises(RedisConnectionError, match="closed by server"):
        await waiting
    assert inbox.is_dirty


async def test_a_reader_without_a_connection_has_nothing_to_read() -> None:
    reader = ReplyReader(1, used=UsedValues())
    assert await reader.can_read()
    assert await reader.can_read_destructive()
    with pytest.raises(RedisConnectionError, match="the connection is closed"):
        await reader.read_response()
    reader.on_disconnect()
