"""Protobuf messages to our types and back; the only file that knows the generated messages.

Each `pack_…` gives the bytes that grpc sends, each `parse_…` takes the bytes that it received and raises
ValueError for what breaks the contract. Frames, which carry the payload, are in `frames.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tq_store.block import HEADER_BYTES, MAX_BLOCK_BYTES
from tq_store.keys import BLOCK_KEY_BYTES, DIGEST_BYTES, BlockKey
from tq_store.results import (
    MAX_NAMESPACES,
    BackendStats,
    NamespaceUsage,
    PutOutcome,
    ShardStats,
    largest_namespaces,
)
from tq_store.rpc.limits import MAX_KEYS, TICKET_BYTES
from tq_store.rpc.v1 import block_store_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["BlockStore"]
SERVICE_NAME: str = _SERVICE.full_name
METHODS = frozenset(method.name for method in _SERVICE.methods)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """What a server tells of itself.

    Args:
        tiers: By name, from the fastest to the slowest.
        counters: Events since the start, by the names that the store gives them.
        shards: By tier name, the servers of those tiers that are made of servers.
    """

    version: str
    uptime_s: float
    tiers: Mapping[str, BackendStats]
    counters: Mapping[str, int]
    shards: Mapping[str, Sequence[ShardStats]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCopy:
    """What one tier has under a key.

    Args:
        block_bytes: 0 where it has nothing.
        header: The first 256 bytes, or fewer where there are fewer.
        problem: Empty for a sound block and for a missing one; otherwise one sentence.
    """

    tier: str
    block_bytes: int = 0
    header: bytes = b""
    problem: str = ""


M = TypeVar("M", bound=Message)


def _parse(kind: type[M], raw: bytes) -> M:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ValueError(f"not a {kind.__name__} message") from error


def _checked_key(key: bytes) -> BlockKey:
    if len(key) != BLOCK_KEY_BYTES:
        raise ValueError(f"a key has {BLOCK_KEY_BYTES} bytes, not {len(key)}")
    return BlockKey(key)


def _checked_keys(keys: Sequence[bytes]) -> list[BlockKey]:
    if len(keys) > MAX_KEYS:
        raise ValueError(f"{len(keys)} keys in one call; at most {MAX_KEYS} are allowed")
    return [_checked_key(key) for key in keys]


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """Request of Lookup, Contains, Get and Delete."""
    return pb.Keys(keys=keys).SerializeToString()


def parse_keys(raw: bytes) -> list[BlockKey]:
    """Keys of a request, at most `MAX_KEYS`."""
    return _checked_keys(_parse(pb.Keys, raw).keys)


def pack_flags(flags: Sequence[bool]) -> bytes:
    """Answer of Contains and Delete."""
    return pb.Flags(flags=flags).SerializeToString()


def parse_flags(raw: bytes, *, num_keys: int) -> list[bool]:
    """One flag per key that was asked for."""
    flags = list(_parse(pb.Flags, raw).flags)
    if len(flags) != num_keys:
        raise ValueError(f"{len(flags)} answers to {num_keys} keys")
    return flags


def pack_hits(num_leading_hits: int) -> bytes:
    """Answer of Lookup."""
    return pb.LookupResponse(num_leading_hits=num_leading_hits).SerializeToString()


def parse_hits(raw: bytes, *, num_keys: int) -> int:
    """Leading hits, never more than keys that were asked for."""
    hits = _parse(pb.LookupResponse, raw).num_leading_hits
    if hits > num_keys:
        raise ValueError(f"{hits} hits for {num_keys} keys")
    return hits


def pack_outcomes(outcomes: Sequence[PutOutcome]) -> bytes:
    """Answer of Put; our values are the wire's values."""
    return pb.PutResponse(outcomes=[_OUTCOME_TO_WIRE[outcome] for outcome in outcomes]).SerializeToString()


def parse_outcomes(raw: bytes, *, num_blocks: int) -> list[PutOutcome]:
    """One outcome per block that was sent."""
    wire = _parse(pb.PutResponse, raw).outcomes
    if len(wire) != num_blocks:
        raise ValueError(f"{len(wire)} outcomes for {num_blocks} blocks")
    return [PutOutcome(value) for value in wire]


_OUTCOME_TO_WIRE = {
    PutOutcome.STORED: pb.PUT_OUTCOME_STORED,
    PutOutcome.PRESENT: pb.PUT_OUTCOME_PRESENT,
    PutOutcome.REFUSED: pb.PUT_OUTCOME_REFUSED,
    PutOutcome.INVALID: pb.PUT_OUTCOME_INVALID,
}


def pack_shared_get(segment: bytes, keys: Sequence[BlockKey]) -> bytes:
    """Request of GetShared."""
    return pb.SharedGetRequest(segment=segment, keys=keys).SerializeToString()


def parse_shared_get(raw: bytes) -> tuple[bytes, list[BlockKey]]:
    """Segment and keys of a request, at most `MAX_KEYS`."""
    message = _parse(pb.SharedGetRequest, raw)
    return message.segment, _checked_keys(message.keys)


def pack_shared_sizes(sizes_bytes: Sequence[int]) -> bytes:
    """Answer of GetShared."""
    return pb.SharedGetResponse(block_bytes=sizes_bytes).SerializeToString()


def parse_shared_sizes(raw: bytes, *, num_keys: int, segment_bytes: int) -> list[int]:
    """Bytes of the blocks that lie in the segment, 0 for a miss; of so many keys, the first ones."""
    sizes_bytes = list(_parse(pb.SharedGetResponse, raw).block_bytes)
    if len(sizes_bytes) > num_keys:
        raise ValueError(f"{len(sizes_bytes)} answers to {num_keys} keys")
    if sum(sizes_bytes) > segment_bytes:
        raise ValueError(f"{sum(sizes_bytes)} bytes in a segment of {segment_bytes}")
    return sizes_bytes


def pack_shared_put(segment: bytes, blocks: Sequence[tuple[BlockKey, int]]) -> bytes:
    """Request of PutShared; blocks by key and bytes."""
    return pb.SharedPutRequest(
        segment=segment, keys=[key for key, _ in blocks], block_bytes=[size for _, size in blocks]
    ).SerializeToString()


def parse_shared_put(raw: bytes) -> tuple[bytes, list[tuple[BlockKey, int]]]:
    """Segment, and key and bytes of the blocks in it, at most `MAX_KEYS` of possible sizes."""
    message = _parse(pb.SharedPutRequest, raw)
    keys, sizes_bytes = _checked_keys(message.keys), list(message.block_bytes)
    if len(sizes_bytes) != len(keys):
        raise ValueError(f"{len(sizes_bytes)} sizes for {len(keys)} keys")
    for size in sizes_bytes:
        if not 0 < size <= MAX_BLOCK_BYTES:
            raise ValueError(f"a block of {size} bytes; it may have 1 to {MAX_BLOCK_BYTES}")
    return message.segment, list(zip(keys, sizes_bytes, strict=True))


def pack_open_pipe() -> bytes:
    """Request of OpenPipe."""
    return pb.OpenPipeRequest().SerializeToString()


def pack_opened_pipe(port: int, ticket: bytes) -> bytes:
    """Answer of OpenPipe; port 0 for none."""
    return pb.OpenPipeResponse(port=port, ticket=ticket).SerializeToString()


def parse_opened_pipe(raw: bytes) -> tuple[int, bytes]:
    """Port and ticket; port 0 for none."""
    message = _parse(pb.OpenPipeResponse, raw)
    if message.port > 65535 or (message.port and len(message.ticket) != TICKET_BYTES):
        raise ValueError(f"a ticket of {len(message.ticket)} bytes for port {message.port}")
    return message.port, message.ticket


def pack_piped_get(pipe: bytes, call: int, keys: Sequence[BlockKey]) -> bytes:
    """Request of GetPiped."""
    return pb.PipedGetRequest(pipe=pipe, call=call, keys=keys).SerializeToString()


def parse_piped_get(raw: bytes) -> tuple[bytes, int, list[BlockKey]]:
    """Pipe, number of the call, and keys, at most `MAX_KEYS`."""
    message = _parse(pb.PipedGetRequest, raw)
    return message.pipe, message.call, _checked_keys(message.keys)


def pack_piped_begin() -> bytes:
    """The one message that answers GetPiped."""
    return pb.PipedGetResponse().SerializeToString()


def pack_purge(namespace: bytes | None) -> bytes:
    """Request of Purge; None means everything."""
    scope = pb.PurgeRequest(all=True) if namespace is None else pb.PurgeRequest(namespace=namespace)
    return scope.SerializeToString()


def parse_purge(raw: bytes) -> bytes | None:
    """Namespace digest, or None for everything. An empty request is refused, so nobody purges by accident."""
    message = _parse(pb.PurgeRequest, raw)
    if message.WhichOneof("scope") == "namespace" and len(message.namespace) == DIGEST_BYTES:
        return message.namespace
    if message.all:
        return None
    raise ValueError(f"a purge names a namespace of {DIGEST_BYTES} bytes, or sets `all`")


def pack_purged(num_blocks: int) -> bytes:
    """Answer of Purge."""
    return pb.PurgeResponse(num_blocks=num_blocks).SerializeToString()


def parse_purged(raw: bytes) -> int:
    """How many blocks were removed."""
    return _parse(pb.PurgeResponse, raw).num_blocks


def pack_stats(stats: ServerStats) -> bytes:
    """Answer of Stats."""
    tiers = [
        pb.TierStats(
            name=name,
            num_blocks=tier.num_blocks,
            used_bytes=tier.used_bytes,
            budget_bytes=tier.budget_bytes,
            evicted_blocks=tier.evicted_blocks,
            namespaces=[
                pb.NamespaceUsage(
                    namespace=bytes.fromhex(digest),
                    num_blocks=usage.num_blocks,
                    used_bytes=usage.used_bytes,
                )
                for digest, usage in largest_namespaces(tier, MAX_NAMESPACES)
            ],
        )
        for name, tier in stats.tiers.items()
    ]
    shards = [
        pb.ShardStats(
            tier=name,
            name=shard.name,
            is_open=shard.is_open,
            failed_calls=shard.failed_calls,
            lost_keys=shard.lost_keys,
        )
        for name, tier_shards in stats.shards.items()
        for shard in tier_shards
    ]
    return pb.StatsResponse(
        tiers=tiers,
        counters=stats.counters,
        version=stats.version,
        uptime_s=stats.uptime_s,
        shards=shards,
    ).SerializeToString()


def parse_stats(raw: bytes) -> ServerStats:
    """What a server tells of itself."""
    message = _parse(pb.StatsResponse, raw)
    tiers = {
        tier.name: BackendStats(
            num_blocks=tier.num_blocks,
            used_bytes=tier.used_bytes,
            budget_bytes=tier.budget_bytes if tier.HasField("budget_bytes") else None,
            evicted_blocks=tier.evicted_blocks,
            namespaces={
                usage.namespace.hex(): NamespaceUsage(
                    num_blocks=usage.num_blocks, used_bytes=usage.used_bytes
                )
                for usage in tier.namespaces
            },
        )
        for tier in message.tiers
    }
    shards: dict[str, list[ShardStats]] = {}
    for shard in message.shards:
        shards.setdefault(shard.tier, []).append(
            ShardStats(
                name=shard.name,
                is_open=shard.is_open,
                failed_calls=shard.failed_calls,
                lost_keys=shard.lost_keys,
            )
        )
    counters = dict(sorted(message.counters.items()))
    return ServerStats(
        version=message.version, uptime_s=message.uptime_s, tiers=tiers, counters=counters, shards=shards
    )


def pack_inspect(key: BlockKey) -> bytes:
    """Request of Inspect."""
    return pb.InspectRequest(key=key).SerializeToString()


def parse_inspect(raw: bytes) -> BlockKey:
    """Key to inspect."""
    return _checked_key(_parse(pb.InspectRequest, raw).key)


def pack_copies(copies: Sequence[TierCopy]) -> bytes:
    """Answer of Inspect."""
    return pb.InspectResponse(
        copies=[
            pb.TierCopy(
                tier=copy.tier, block_bytes=copy.block_bytes, header=copy.header, problem=copy.problem
            )
            for copy in copies
        ]
    ).SerializeToString()


def parse_copies(raw: bytes) -> list[TierCopy]:
    """What each tier has, from the fastest to the slowest."""
    return [
        TierCopy(
            tier=copy.tier,
            block_bytes=copy.block_bytes,
            header=copy.header[:HEADER_BYTES],
            problem=copy.problem,
        )
        for copy in _parse(pb.InspectResponse, raw).copies
    ]


def pack_ping() -> bytes:
    """Request of Ping."""
    return pb.PingRequest().SerializeToString()


def pack_pong(version: str) -> bytes:
    """Answer of Ping."""
    return pb.PingResponse(version=version).SerializeToString()


def parse_pong(raw: bytes) -> str:
    """Version of the server."""
    return _parse(pb.PingResponse, raw).version


def pack_stats_request() -> bytes:
    """Request of Stats."""
    return pb.StatsRequest().SerializeToString()
