"""Fuzz targets over every other parser: messages, frames, tokens, and the files that operators write.

::

    python tests/fuzz/fuzz_wire.py --seconds 60 [--target frame]

A target may raise what its parser says that it raises, and nothing else.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from redis._parsers import BaseParser
from redis.exceptions import InvalidResponse

from tq_store.backends.redis_reader import Inbox
from tq_store.backends.redis_target import parse_target
from tq_store.config import ServerConfig, load_config
from tq_store.errors import ConfigError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, parse_key
from tq_store.results import BackendStats, NamespaceUsage, PutOutcome, ShardStats
from tq_store.rpc import convert
from tq_store.rpc.frames import Assembler, Frame, pack_frame, parse_frame
from tq_store.rpc.token import load_tokens
from tq_store.server.calls import is_local_peer
from tq_store.server.credentials import TenantDirectory
from tq_store.server.tenants import Tenant, Tenants, load_tenants
from tq_store.server.tokens import new_token, parse_entry

KEY = BlockKey(bytes(range(BLOCK_KEY_BYTES)))
_STATS = convert.ServerStats(
    version="1",
    uptime_s=1.5,
    tiers={
        "redis": BackendStats(
            num_blocks=3,
            used_bytes=1 << 40,
            budget_bytes=None,
            evicted_blocks=0,
            namespaces={"ab" * 32: NamespaceUsage(num_blocks=1, used_bytes=2)},
        )
    },
    counters={"misses": 7},
    shards={"redis": [ShardStats(name="a:1", is_open=True, failed_calls=1, lost_keys=2)]},
)
_TOKEN, _ENTRY = new_token()
_TENANTS = f'''[search]
tokens = ["{_ENTRY}"]
bytes = "2GiB"
keys = 7
namespaces = ["{"ab" * 32}"]
group = "g"
admin = true
'''
_DIRECTORY = TenantDirectory(Tenants({"search": Tenant(name="search", tokens=(_ENTRY,))}))


@dataclass(frozen=True)
class Target:
    """What is fed, with what, and how it may fail."""

    run: Callable[[bytes], object]
    corpus: Sequence[bytes]
    failure: type[Exception] = ValueError


def _frame(data: bytes) -> None:
    frame = parse_frame(data)
    assert parse_frame(pack_frame(frame)) == frame, "a frame reads differently once written"


def _stream(data: bytes, *, keyed: bool) -> None:
    """Frames of one call, each with its length before it in two bytes."""
    assembler, most_bytes = Assembler(num_blocks=4, keyed=keyed), 0
    while len(data) > 2:
        num_bytes = int.from_bytes(data[:2], "little")
        frame, data = parse_frame(data[2 : 2 + num_bytes]), data[2 + num_bytes :]
        most_bytes += len(frame.data)
        block = assembler.add(frame)
        if block is not None:
            assert block.index < 4
            assert len(block.data or b"") <= most_bytes, "a block of more bytes than came"


def _pack_stream(frames: Sequence[Frame]) -> bytes:
    packed = [pack_frame(frame) for frame in frames]
    return b"".join(len(raw).to_bytes(2, "little") + raw for raw in packed)


def _small_frames(index: int, data: bytes, key: bytes = b"") -> list[Frame]:
    view = memoryview(data)
    first = Frame(index=index, block_bytes=len(data), key=key, data=view[:9])
    return [first, *(Frame(index=index, offset=at, data=view[at : at + 9]) for at in range(9, len(data), 9))]


def _token(data: bytes) -> None:
    identity = _DIRECTORY.identify(data.decode("latin-1"))
    assert (identity is not None) == (data == _TOKEN.encode()), "a token that is not one"


def _as_file(load: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return load(Path(file.name))

    return run


def _config(file: Path) -> ServerConfig:
    return load_config(ServerConfig, arguments={}, file=file, environment={})


class _Transport:
    """What a reader of Redis replies needs of one."""

    def get_protocol(self) -> asyncio.Protocol:
        return asyncio.Protocol()

    def abort(self) -> None:
        pass


def _redis_replies(data: bytes) -> None:
    """Fed in small pieces, until the reader gives up."""
    reader = Inbox(_Transport(), parse_error=BaseParser.parse_error)
    while data and not isinstance(reader.failure, InvalidResponse):
        room = reader.get_buffer(-1)
        taken = min(len(room), 7, len(data))
        assert taken, "a reader without room for more"
        room[:taken] = data[:taken]
        del room
        reader.buffer_updated(taken)
        data = data[taken:]
    if reader.failure is not None:
        raise reader.failure


_PUT = _pack_stream([*_small_frames(0, bytes(40), KEY), *_small_frames(1, bytes(10), KEY)])
_GET = _pack_stream([*_small_frames(0, bytes(40)), Frame(index=1), *_small_frames(2, bytes(10))])
_COPY = convert.TierCopy(tier="disk", block_bytes=9, header=bytes(9), problem="short")

TARGETS = {
    "frame": Target(_frame, [pack_frame(Frame(index=3, offset=9, data=memoryview(b"data"))), _PUT[2:]]),
    "put": Target(lambda data: _stream(data, keyed=True), [_PUT]),
    "get": Target(lambda data: _stream(data, keyed=False), [_GET]),
    "keys": Target(convert.parse_keys, [convert.pack_keys([KEY, KEY])]),
    "flags": Target(lambda data: convert.parse_flags(data, num_keys=2), [convert.pack_flags([True, False])]),
    "hits": Target(lambda data: convert.parse_hits(data, num_keys=9), [convert.pack_hits(7)]),
    "outcomes": Target(
        lambda data: convert.parse_outcomes(data, num_blocks=4), [convert.pack_outcomes(list(PutOutcome))]
    ),
    "purge": Target(convert.parse_purge, [convert.pack_purge(KEY[:32]), convert.pack_purge(None)]),
    "stats": Target(convert.parse_stats, [convert.pack_stats(_STATS)]),
    "inspect": Target(convert.parse_inspect, [convert.pack_inspect(KEY)]),
    "copies": Target(convert.parse_copies, [convert.pack_copies([_COPY, _COPY])]),
    "shared_get": Target(convert.parse_shared_get, [convert.pack_shared_get(bytes(16), [KEY])]),
    "shared_put": Target(convert.parse_shared_put, [convert.pack_shared_put(bytes(16), [(KEY, 512)])]),
    "shared_sizes": Target(
        lambda data: convert.parse_shared_sizes(data, num_keys=3, segment_bytes=999),
        [convert.pack_shared_sizes([0, 512, 300])],
    ),
    "block_key": Target(lambda data: parse_key(data.decode("latin-1")), [KEY.hex().encode()]),
    "token": Target(_token, [_TOKEN.encode()]),
    "entry": Target(lambda data: parse_entry(data.decode("latin-1")), [str(_ENTRY).encode()]),
    "peer": Target(
        lambda data: is_local_peer(data.decode("latin-1")), [b"ipv4:127.0.0.1:5", b"ipv6:[::1]:5"]
    ),
    "redis_replies": Target(
        _redis_replies, [b"*2\r\n$3\r\nabc\r\n:-7\r\n$-1\r\n", b"-ERR no\r\n+OK\r\n*0\r\n"], InvalidResponse
    ),
    "redis_url": Target(
        lambda data: parse_target(data.decode("latin-1")),
        [b"redis://u:p%40@h:1/2", b"rediss+sentinel://a,b:2/s/3", b"unix://:p@/r.sock?db=1"],
        ConfigError,
    ),
    "password_file": Target(
        _as_file(lambda path: parse_target("redis://h", password_file=path)), [b"a word\n"], ConfigError
    ),
    "tenants_file": Target(_as_file(load_tenants), [_TENANTS.encode()], ConfigError),
    "token_file": Target(_as_file(load_tokens), [_TOKEN.encode() + b"\n" + b"x" * 16], ConfigError),
    "config_file": Target(_as_file(_config), [b"[server]\nmemory_budget = '2GiB'\ngrace = 5\n"], ConfigError),
}


_TROUBLE = (b"\xff" * 9 + b"\x01", b"\x80" * 12, b"\x00", b"\x7f", b'"', b"[", b"[" * 5000, b"\n")


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """A member of the corpus after up to four changes."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(data))
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 2, 9, 100]))
            case 3:
                data[at:at] = rng.choice(_TROUBLE)
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case _:
                del data[at : at + rng.randint(1, 8)]
    return bytes(data)


def fuzz(name: str, seed: int, keep_going: Callable[[int], bool]) -> Counter[str]:
    """Feed a target for as long as `keep_going(runs so far)` holds; says how often it took and refused.

    Raises:
        AssertionError: It raised something else; the message holds the input.
    """
    target, rng, seen, runs = TARGETS[name], random.Random(seed), Counter[str](), 0
    while keep_going(runs):
        data = mutated(rng, target.corpus)
        try:
            target.run(data)
            seen["taken"] += 1
        except target.failure:
            seen["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}: {error!r} on run {runs} of seed {seed}, input {data!r}") from error
        runs += 1
    return seen


def main() -> None:
    """Fuzz all targets, or one, for a time; a finding ends it with a traceback and status 1."""
    parser = argparse.ArgumentParser(description="Fuzz the parsers of messages, tokens and files.")
    parser.add_argument("--seconds", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--target", choices=TARGETS, default=None)
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    names = [args.target] if args.target else list(TARGETS)
    for name in names:
        deadline = time.monotonic() + args.seconds / len(names)
        seen = fuzz(name, seed, lambda _, deadline=deadline: time.monotonic() < deadline)
        print(f"seed {seed}, {name}: {seen['taken']} taken, {seen['refused']} refused")


if __name__ == "__main__":
    main()
