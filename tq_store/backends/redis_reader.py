"""Reads a Redis server's replies, large values straight into the bytes that are handed out."""

import asyncio
import io
import socket
from collections import deque
from typing import Any

from redis._parsers import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

from tq_store.backends.used_values import UsedValues
from tq_store.block import MAX_BLOCK_BYTES

_INBOX_BYTES = 64 << 10
_MAX_VALUE_BYTES = 2 * MAX_BLOCK_BYTES
"""Room for the largest block in any container; Redis itself stores no more in one value."""
_MAX_ITEMS = 1 << 20
_LOW_WATER_BYTES = 1 << 20
"""Of a value so much is waited for before more of it is read: each time costs a turn of the event loop."""
_END = b"\r\n"


class ReplyReader(BaseParser):
    """The `parser_class` of our connections: RESP2, as redis-py's own parsers, for a third of their time.

    Those read a value of 4 MiB through a stream, which copies it several times. This one takes the place of
    the stream: the socket's bytes land where the value will be.
    """

    def __init__(self, socket_read_size: int, *, used: UsedValues) -> None:
        del socket_read_size  # a socket is read into whatever room there is
        self._used = used
        self._inbox: Inbox | None = None

    def on_connect(self, connection: Any) -> None:
        """Take over what arrives; what leaves goes on through the connection's stream."""
        transport = connection._writer.transport  # noqa: SLF001  # parsers live inside their connection
        self._inbox = Inbox(transport, parse_error=self.parse_error, used=self._used)
        transport.set_protocol(self._inbox)

    def on_disconnect(self) -> None:
        """End the connection at once: TLS would wait for a server that stalls."""
        if self._inbox is not None:
            self._inbox.abort()
            self._inbox = None

    async def can_read(self) -> bool:
        """Whether there is anything unread, the end included; then the pool connects anew."""
        return self._inbox is None or self._inbox.is_dirty

    async def can_read_destructive(self) -> bool:
        """The same, as older releases call it."""
        return await self.can_read()

    async def read_response(self, disable_decoding: bool = False, **_: Any) -> Any:
        """The next reply: a value, or an error that the server sent."""
        if self._inbox is None:
            raise RedisConnectionError("the connection is closed")
        reply = await self._inbox.next_reply()
        if isinstance(reply, RedisConnectionError):
            raise reply
        return reply


class Inbox(asyncio.BufferedProtocol):
    """Cuts what arrives into replies, as it arrives.

    Stands between a transport and the protocol that it had, which still hears of everything but the data.
    What is not read yet is bounded by what was asked for. Values are written to memory of `used` ones.
    """

    def __init__(self, transport: Any, *, parse_error: Any, used: UsedValues) -> None:
        self._used = used
        self._transport = transport
        self._behind = transport.get_protocol()
        self._parse_error = parse_error
        self._buffer = bytearray(_INBOX_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._value: io.BytesIO | None = None
        self._room = memoryview(b"")
        self._num_to_skip = 0
        self._low_water_bytes = 1
        # of an encrypted value, what the socket has is not what is waited for
        is_plain = transport.get_extra_info("sslcontext") is None
        self._socket = transport.get_extra_info("socket") if is_plain else None
        self._arrays: list[tuple[int, list[Any]]] = []
        self._replies: deque[Any] = deque()
        self.failure: Exception | None = None
        """Why there are no more replies than those that wait."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_dirty(self) -> bool:
        """Whether something has arrived that nobody has read."""
        return bool(self._replies or self.failure or self._value is not None or self._start < self._end)

    async def next_reply(self) -> Any:
        """Wait for a reply."""
        while not self._replies:
            if self.failure is not None:
                raise self.failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._replies.popleft()

    def abort(self) -> None:
        """End the connection."""
        self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: into the value that is under way, or to the others."""
        if self._value is not None:
            return self._room
        if self._start:
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes have arrived there."""
        if self._value is None:
            self._end += nbytes
        else:
            # the transport still holds the view that it wrote to, and a value with views is copied
            written, self._room = self._room, self._room[nbytes:]
            written.release()
            if len(self._room) < self._low_water_bytes:
                self._wait_for(len(self._room))
        try:
            self._cut()
        except (ValueError, InvalidResponse) as error:
            self._fail(InvalidResponse(f"not a reply: {error}"))
            self._transport.abort()

    def eof_received(self) -> bool:
        """The server has closed; so do we."""
        self._fail(RedisConnectionError("Connection closed by server."))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._fail(RedisConnectionError(f"Connection lost: {exc or 'closed'}"))
        self._behind.connection_lost(exc)

    def pause_writing(self) -> None:
        """Writers wait."""
        self._behind.pause_writing()

    def resume_writing(self) -> None:
        """Writers go on."""
        self._behind.resume_writing()

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cut(self) -> None:
        while True:
            if self._value is not None:
                if len(self._room):
                    return
                self._room.release()
                # the same bytes that were written to: nothing is copied
                value, self._value = self._value.getvalue(), None
                self._num_to_skip = len(_END)
                self._used.add(value)
                self._add(value)
            skipped = min(self._num_to_skip, self._end - self._start)
            self._start += skipped
            self._num_to_skip -= skipped
            line_end = self._buffer.find(_END, self._start, self._end)
            if self._num_to_skip or line_end < 0:
                if self._end - self._start == _INBOX_BYTES:
                    raise ValueError("a line without an end")
                return
            line = bytes(self._view[self._start : line_end])
            self._start = line_end + len(_END)
            self._read(line[:1], line[1:])

    def _read(self, kind: bytes, rest: bytes) -> None:
        if kind == b":":
            self._add(int(rest))
        elif kind == b"$":
            self._begin_value(int(rest))
        elif kind == b"+":
            self._add(rest)
        elif kind == b"-":
            self._add(self._parse_error(rest.decode(errors="replace")))
        elif kind == b"*":
            self._begin_array(int(rest))
        else:
            raise ValueError(f"it starts with {kind!r}")

    def _begin_value(self, num_bytes: int) -> None:
        if num_bytes == -1:
            self._add(None)
            return
        if not 0 <= num_bytes <= _MAX_VALUE_BYTES:
            raise ValueError(f"a value of {num_bytes} bytes")
        # with no other reference to them, the very bytes are written to
        self._value = io.BytesIO(self._used.take(num_bytes))
        self._room = self._value.getbuffer()
        here = min(num_bytes, self._end - self._start)
        self._room[:here] = self._view[self._start : self._start + here]
        self._start += here
        self._room = self._room[here:]
        self._wait_for(len(self._room))

    def _wait_for(self, num_bytes: int) -> None:
        """Have the socket report nothing before so many bytes are there, as far as that is sensible."""
        num_bytes = max(1, min(num_bytes, _LOW_WATER_BYTES))
        if self._socket is not None and num_bytes != self._low_water_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self._low_water_bytes = num_bytes

    def _begin_array(self, num_items: int) -> None:
        if not -1 <= num_items <= _MAX_ITEMS:
            raise ValueError(f"an array of {num_items} items")
        if num_items > 0:
            self._arrays.append((num_items, []))
        else:
            self._add(None if num_items < 0 else [])

    def _add(self, item: Any) -> None:
        """An item of the innermost array that is under way, or a reply."""
        while self._arrays:
            num_items, items = self._arrays[-1]
            items.append(item)
            if len(items) < num_items:
                return
            self._arrays.pop()
            item = items
        self._replies.append(item)
        self._wake()
