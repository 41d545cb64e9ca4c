"""Fuzz target over the messages of the service, as either side reads them from the other."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fuzz.driver import mutated

from tq_store.block import HEADER_BYTES
from tq_store.keys import BLOCK_KEY_BYTES, DIGEST_BYTES, BlockKey
from tq_store.results import BackendStats, NamespaceUsage, PutOutcome, ShardStats
from tq_store.rpc import convert
from tq_store.rpc.limits import MAX_KEYS, TICKET_BYTES
from tq_store.rpc.v1 import block_store_pb2 as pb

_COUNT = 5
_SEGMENT_KEYS = 3
_SEGMENT_BYTES = 999
_KEYS = [BlockKey(bytes([number]) * BLOCK_KEY_BYTES) for number in range(_COUNT)]
_STATS = convert.ServerStats(
    version="1.2",
    uptime_s=12.5,
    tiers={
        "memory": BackendStats(num_blocks=3, used_bytes=1000, budget_bytes=5000, evicted_blocks=1),
        "redis": BackendStats(
            num_blocks=2**40,
            used_bytes=2**60,
            budget_bytes=None,
            evicted_blocks=0,
            namespaces={"ab" * DIGEST_BYTES: NamespaceUsage(num_blocks=1, used_bytes=2)},
        ),
    },
    counters={"misses": 7, "hits_memory": 2**63},
    shards={"redis": [ShardStats(name="a:1", is_open=True, failed_calls=3, lost_keys=4)]},
)
_COPIES = [
    convert.TierCopy(tier="memory", block_bytes=400, header=bytes(HEADER_BYTES)),
    convert.TierCopy(tier="disk", problem="it is damaged"),
]
_KINDS: tuple[tuple[Callable[[bytes], Any], bytes], ...] = (
    (convert.parse_keys, convert.pack_keys(_KEYS)),
    (lambda raw: convert.parse_flags(raw, num_keys=_COUNT), convert.pack_flags([True, False] * 2 + [True])),
    (lambda raw: convert.parse_hits(raw, num_keys=_COUNT), convert.pack_hits(3)),
    (
        lambda raw: convert.parse_outcomes(raw, num_blocks=_COUNT),
        convert.pack_outcomes([*PutOutcome, PutOutcome.STORED]),
    ),
    (convert.parse_purge, convert.pack_purge(b"n" * DIGEST_BYTES)),
    (convert.parse_purge, convert.pack_purge(None)),
    (convert.parse_purged, convert.pack_purged(9)),
    (convert.parse_stats, convert.pack_stats(_STATS)),
    (convert.parse_inspect, convert.pack_inspect(_KEYS[0])),
    (convert.parse_copies, convert.pack_copies(_COPIES)),
    (convert.parse_pong, convert.pack_pong("1.2")),
    (convert.parse_shared_get, convert.pack_shared_get(bytes(16), _KEYS)),
    (convert.parse_shared_put, convert.pack_shared_put(bytes(16), [(_KEYS[0], 512), (_KEYS[1], 300)])),
    (
        lambda raw: convert.parse_shared_sizes(raw, num_keys=_SEGMENT_KEYS, segment_bytes=_SEGMENT_BYTES),
        convert.pack_shared_sizes([0, 512, 300]),
    ),
    (convert.parse_opened_pipe, convert.pack_opened_pipe(7438, bytes(TICKET_BYTES))),
    (convert.parse_piped_get, convert.pack_piped_get(bytes(16), 2**63, _KEYS)),
    (convert.parse_keys, pb.Keys(keys=[b""] * (MAX_KEYS + 1)).SerializeToString()),
)
"""Who reads a message, and one to begin with."""


def generate(rng: random.Random) -> bytes:
    """A message after some changes, at times one for another reader."""
    kind = rng.randrange(len(_KINDS))
    message = mutated(rng, _KINDS[kind][1])
    return bytes([rng.randrange(len(_KINDS)) if rng.random() < 0.1 else kind]) + message


def outcomes(data: bytes) -> Iterator[str]:
    """The first byte chooses the reader."""
    parse, _ = _KINDS[(data or b"\0")[0] % len(_KINDS)]
    try:
        value = parse(data[1:])
    except ValueError:
        yield "refused"
        return
    _check(value)
    yield "message"


def _check(value: object) -> None:
    """Whatever was read keeps the bounds of the contract."""
    if isinstance(value, bytes):
        assert len(value) in (DIGEST_BYTES, BLOCK_KEY_BYTES), "a digest or key of another length"
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, bytes):
                assert len(value) <= MAX_KEYS, "more keys than a call may carry"
                assert len(item) == BLOCK_KEY_BYTES, "a key of another length"
            elif isinstance(item, convert.TierCopy):
                assert len(item.header) <= HEADER_BYTES, "a header that is longer than one"
            elif type(item) is int:
                assert len(value) <= _SEGMENT_KEYS, "answers to other keys than were asked for"
                assert sum(value) <= _SEGMENT_BYTES, "more bytes than a segment has"
            else:
                assert len(value) == _COUNT, "answers to other keys than were asked for"
    elif isinstance(value, tuple):
        assert len(value[-1]) <= MAX_KEYS, "more keys than a call may carry"
    elif isinstance(value, int):
        assert value >= 0, "a negative count"
    elif isinstance(value, convert.ServerStats):
        convert.pack_stats(value)


@contextmanager
def opened() -> Iterator[Callable[[bytes], Iterator[str]]]:
    """Nothing to prepare."""
    yield outcomes
