from collections.abc import Callable
from functools import partial

import grpc
import pytest
from store.sample_blocks import sample_key

from tq_store.block import MAX_BLOCK_BYTES
from tq_store.errors import (
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    ChecksumMismatch,
    RpcDenied,
    RpcError,
    RpcOverLimit,
    RpcTimeout,
    RpcUnavailable,
    TQStoreError,
)
from tq_store.results import BackendStats, NamespaceUsage, PutOutcome, ShardStats
from tq_store.rpc import convert
from tq_store.rpc.limits import MAX_KEYS
from tq_store.rpc.status import error_of, status_of
from tq_store.rpc.v1 import block_store_pb2 as pb

sizes_of_two = partial(convert.parse_shared_sizes, num_keys=2, segment_bytes=10)
KEYS = [sample_key(number) for number in range(3)]


def test_messages_survive_the_way_there_and_back() -> None:
    assert convert.parse_keys(convert.pack_keys(KEYS)) == KEYS
    assert convert.parse_flags(convert.pack_flags([True, False]), num_keys=2) == [True, False]
    assert convert.parse_hits(convert.pack_hits(2), num_keys=2) == 2
    assert convert.parse_outcomes(convert.pack_outcomes(list(PutOutcome)), num_blocks=4) == list(PutOutcome)
    assert convert.parse_purge(convert.pack_purge(None)) is None
    assert convert.parse_purge(convert.pack_purge(bytes(32))) == bytes(32)
    assert convert.parse_purged(convert.pack_purged(7)) == 7
    assert convert.parse_inspect(convert.pack_inspect(KEYS[0])) == KEYS[0]
    assert convert.parse_shared_get(convert.pack_shared_get(b"handle", KEYS)) == (b"handle", KEYS)
    placed = [(KEYS[0], 7), (KEYS[1], MAX_BLOCK_BYTES)]
    assert convert.parse_shared_put(convert.pack_shared_put(b"handle", placed)) == (b"handle", placed)
    sizes_bytes = convert.pack_shared_sizes([7, 0])
    assert convert.parse_shared_sizes(sizes_bytes, num_keys=3, segment_bytes=7) == [7, 0]
    assert convert.parse_pong(convert.pack_pong("1.2")) == "1.2"
    copies = [convert.TierCopy(tier="disk", block_bytes=9, header=b"h", problem="p")]
    assert convert.parse_copies(convert.pack_copies(copies)) == copies


def test_our_outcomes_have_the_values_of_the_wire() -> None:
    wire = {name.removeprefix("PUT_OUTCOME_"): value for name, value in pb.PutOutcome.items()}
    assert wire == {outcome.name: outcome.value for outcome in PutOutcome} | {"UNSPECIFIED": 0}


@pytest.mark.parametrize("budget_bytes", [None, 0, 5])
def test_stats_keep_the_order_of_tiers_and_tell_no_budget_from_zero(budget_bytes: int | None) -> None:
    tier = BackendStats(num_blocks=1, used_bytes=2, budget_bytes=budget_bytes, evicted_blocks=3)
    stats = convert.ServerStats(
        version="1", uptime_s=1.5, tiers={"memory": tier, "disk": tier}, counters={"a": 1, "b": 2}
    )
    parsed = convert.parse_stats(convert.pack_stats(stats))
    assert parsed == stats
    assert list(parsed.tiers) == ["memory", "disk"]


def test_stats_carry_shards_and_the_largest_namespaces() -> None:
    usage = {f"{number:064x}": NamespaceUsage(num_blocks=number, used_bytes=number) for number in range(300)}
    tier = BackendStats(num_blocks=1, used_bytes=2, budget_bytes=None, evicted_blocks=3, namespaces=usage)
    shards = [ShardStats(name="host:1", is_open=True, failed_calls=3, lost_keys=9)]
    stats = convert.ServerStats(
        version="1", uptime_s=1.5, tiers={"redis": tier}, counters={}, shards={"redis": shards}
    )
    parsed = convert.parse_stats(convert.pack_stats(stats))
    assert parsed.shards == stats.shards
    kept = {f"{number:064x}": usage[f"{number:064x}"] for number in range(44, 300)}
    assert parsed.tiers["redis"].namespaces == kept


def test_a_header_is_not_taken_for_longer_than_it_is() -> None:
    raw = pb.InspectResponse(copies=[pb.TierCopy(tier="t", header=bytes(1000))]).SerializeToString()
    assert len(convert.parse_copies(raw)[0].header) == 256


@pytest.mark.parametrize(
    ("parse", "raw", "complaint"),
    [
        (convert.parse_keys, b"\x0a\x05abc", "not a Keys message"),
        (convert.parse_keys, pb.Keys(keys=[b"short"]).SerializeToString(), "64 bytes, not 5"),
        (convert.parse_keys, convert.pack_keys(KEYS[:1] * (MAX_KEYS + 1)), "4097 keys"),
        (convert.parse_inspect, b"", "64 bytes, not 0"),
        (convert.parse_purge, b"", "names a namespace"),
        (convert.parse_purge, pb.PurgeRequest(all=False).SerializeToString(), "names a namespace"),
        (convert.parse_purge, pb.PurgeRequest(namespace=b"short").SerializeToString(), "names a namespace"),
        (lambda raw: convert.parse_flags(raw, num_keys=1), b"", "0 answers to 1 keys"),
        (lambda raw: convert.parse_hits(raw, num_keys=1), convert.pack_hits(2), "2 hits for 1 keys"),
        (lambda raw: convert.parse_outcomes(raw, num_blocks=1), b"", "0 outcomes for 1 blocks"),
        (lambda raw: convert.parse_outcomes(raw, num_blocks=1), b"\x0a\x01\x09", "9 is not a valid"),
        (convert.parse_shared_get, convert.pack_shared_get(b"", KEYS[:1] * (MAX_KEYS + 1)), "4097 keys"),
        (convert.parse_shared_put, pb.SharedPutRequest(keys=KEYS).SerializeToString(), "0 sizes for 3 keys"),
        (convert.parse_shared_put, convert.pack_shared_put(b"", [(KEYS[0], 0)]), "a block of 0 bytes"),
        (convert.parse_shared_put, convert.pack_shared_put(b"", [(KEYS[0], 1 << 40)]), "it may have 1 to"),
        (sizes_of_two, convert.pack_shared_sizes([1, 1, 1]), "3 answers to 2 keys"),
        (sizes_of_two, convert.pack_shared_sizes([6, 5]), "11 bytes in a segment of 10"),
    ],
)
def test_messages_that_break_the_contract_are_rejected(
    parse: Callable[[bytes], object], raw: bytes, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(raw)


def test_as_many_keys_as_allowed_are_taken() -> None:
    assert len(convert.parse_keys(convert.pack_keys(KEYS[:1] * MAX_KEYS))) == MAX_KEYS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendTimeout("t"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED),
        (BackendUnavailable("u"), grpc.StatusCode.UNAVAILABLE),
        (BackendFull("f"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ChecksumMismatch("c"), grpc.StatusCode.INVALID_ARGUMENT),
        (ValueError("v"), grpc.StatusCode.INVALID_ARGUMENT),
        (RpcDenied("d"), grpc.StatusCode.UNAUTHENTICATED),
        (TQStoreError("?"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_become_statuses(error: Exception, code: grpc.StatusCode) -> None:
    assert status_of(error) is code


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, RpcTimeout),
        (grpc.StatusCode.UNAVAILABLE, RpcUnavailable),
        (grpc.StatusCode.UNAUTHENTICATED, RpcDenied),
        (grpc.StatusCode.PERMISSION_DENIED, RpcDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, RpcOverLimit),
        (grpc.StatusCode.INVALID_ARGUMENT, RpcError),
        (grpc.StatusCode.INTERNAL, RpcError),
    ],
)
def test_statuses_become_errors(code: grpc.StatusCode, kind: type[RpcError]) -> None:
    error = error_of(code, "why")
    assert type(error) is kind
    assert str(error) == "why"
