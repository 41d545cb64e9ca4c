"""Fuzz target over the reader of Redis replies, fed in small pieces as a network does."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fuzz.driver import mutated
from redis._parsers import BaseParser
from redis.exceptions import InvalidResponse

from tq_store.backends.redis_reader import Inbox
from tq_store.backends.used_values import UsedValues

_REPLIES = [b"*2\r\n$3\r\nabc\r\n:-7\r\n$-1\r\n", b"-ERR no\r\n+OK\r\n*0\r\n"]
_PIECES = [
    b"\r\n",
    b"$",
    b"*",
    b":",
    b"-1",
    b"9" * 30,
    b"$9999999999\r\n",
    b"*99999999\r\n",
    b"*1\r\n" * 2000,
]
_READ_BYTES = 7


class _Transport:
    """What a reader of replies needs of one."""

    def get_protocol(self) -> asyncio.Protocol:
        return asyncio.Protocol()

    def get_extra_info(self, name: str) -> None:
        """Neither a socket nor TLS."""

    def abort(self) -> None:
        pass


def generate(rng: random.Random) -> bytes:
    """Some replies, changed."""
    return mutated(rng, rng.choice(_REPLIES), _PIECES)


def outcomes(data: bytes) -> Iterator[str]:
    """Feed until the reader gives up."""
    reader = Inbox(_Transport(), parse_error=BaseParser.parse_error, used=UsedValues())  # type: ignore[arg-type]
    while data and not isinstance(reader.failure, InvalidResponse):
        room = reader.get_buffer(-1)
        taken = min(len(room), _READ_BYTES, len(data))
        assert taken, "a reader without room for more"
        room[:taken] = data[:taken]
        del room
        reader.buffer_updated(taken)
        data = data[taken:]
    if reader.failure is None:
        yield "replies"
        return
    assert isinstance(reader.failure, InvalidResponse), f"failed with {reader.failure!r}"
    yield "refused"


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """Nothing to prepare."""
    yield outcomes
