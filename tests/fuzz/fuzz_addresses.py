"""Fuzz target over what stands on one line: addresses, URLs of Redis, keys, grpc's peers, tables by layer."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fuzz.driver import mutated

from tq_store.backends.redis_target import parse_target
from tq_store.config import is_local, split_address
from tq_store.errors import ConfigError
from tq_store.keys import BLOCK_KEY_BYTES, parse_key
from tq_store.layer_table import LayerTable
from tq_store.server.calls import is_local_peer

_PASSWORD = "p4ssw0rd"
_ADDRESSES = ["127.0.0.1:7437", "[::1]:0", "unix:/run/tq-store.sock", "localhost:65535", "10.0.0.1:1"]
_URLS = [
    f"redis://user:{_PASSWORD}@host:6379/0",
    f"rediss+sentinel://:{_PASSWORD}@a:1,b:2/service/3",
    f"redis+cluster://{_PASSWORD}@[::1]:7000,host",
    f"unix://user:{_PASSWORD}@/run/redis.sock?db=2",
]
_PEERS = ["ipv4:127.0.0.1:5", "ipv6:%5B::1%5D:5", "unix:", "ipv6:[::ffff:127.0.0.1]:9"]
_TABLES = ["tq4", "tq3+tq4:0-1,29", "tq3+k8v4:0+raw:65535,99999", "k4v3+tq2:3,4-6,7"]
_PIECES = [
    *(b":", b"/", b"@", b"[", b"]", b"%", b"%00", b"%ff", b",", b"?", b"#", b"\x00", b"\n", b" ", b"99999"),
    *(b"+", b"-", b"+tq4:0-1,2", b"0", b"4-5"),
    *(b"unix:", b"redis://", "\u0663".encode(), "\u00b2".encode(), b"::", b"255.255.255.255", b"." * 300),
]


def generate(rng: random.Random) -> bytes:
    """A line of one of the kinds, changed."""
    kind = rng.randrange(5)
    key = rng.randbytes(BLOCK_KEY_BYTES).hex()
    start = (rng.choice(_ADDRESSES), rng.choice(_URLS), key, rng.choice(_PEERS), rng.choice(_TABLES))[kind]
    return bytes([kind]) + mutated(rng, start.encode(), _PIECES)


def outcomes(data: bytes) -> Iterator[str]:
    """The first byte says which parser it is for."""
    kind, text = (data or b"\0")[0] % 5, data[1:].decode(errors="surrogateescape")
    try:
        yield (_address, _url, _key, _peer, _table)[kind](text)
    except (ConfigError, ConfigError, ValueError, (), ConfigError)[kind] as error:
        refusal = f"{error} {error.__cause__}"
    else:
        return
    assert kind in (0, 4) or _PASSWORD not in refusal, "a message shows a password"
    yield "refused"


def _address(text: str) -> str:
    host, port = split_address(text)
    assert host, "an address without a host"
    assert port is None or 0 <= port <= 65535, "a port that cannot be"
    return "local address" if is_local(text) else "address"


def _url(text: str) -> str:
    target = parse_target(text)
    assert target.addresses, "a Redis without an address"
    assert "password=" not in repr(target), "a target shows its password"
    return target.arrangement.value


def _key(text: str) -> str:
    assert parse_key(text).hex() == text.lower(), "a key that is not what was typed"
    return "key"


def _peer(text: str) -> str:
    return "local peer" if is_local_peer(text) else "peer"


def _table(text: str) -> str:
    table = LayerTable.parse(text)
    assert LayerTable.parse(str(table)) == table, "a table that its own name does not give"
    assert len(table.by_layer(100_000)) == 100_000, "a layer without a preset"
    return "table"


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """Nothing to prepare."""
    yield outcomes
