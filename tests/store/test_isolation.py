"""Tenants on a real server: what one has, no other can read, probe, remove or time."""

import asyncio
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from store.redis_process import RedisProcess
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import (
    NAMESPACE,
    OTHER_NAMESPACE,
    keys_of,
    sample_block,
    sample_blocks,
    sample_key,
)
from store.some_quotas import quotas_over
from store.tenants_file import TenantsFile

from tq_store.client import StoreClient
from tq_store.errors import RpcDenied, RpcError
from tq_store.keys import BlockKey
from tq_store.results import PutOutcome
from tq_store.rpc import convert
from tq_store.server import credentials as credentials_module
from tq_store.server.app import Server
from tq_store.server.tenants import Tenant
from tq_store.tiering.store import TieredStore

STORED, PRESENT = PutOutcome.STORED, PutOutcome.PRESENT


@pytest.fixture
def file(tmp_path: Path) -> TenantsFile:
    file = TenantsFile(tmp_path)
    file.add("a")
    file.add("b")
    file.add("ops", admin=True)
    return file


@pytest.fixture(params=["streams", "pipes", "shared memory"])
def server(file: TenantsFile, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    listen = f"unix:{tmp_path}/socket" if request.param == "shared memory" else "127.0.0.1:0"
    pipes = 8 if request.param == "pipes" else 0
    with running_server(
        listen=listen, payload_pipes=pipes, tenants_file=file.path, metrics_port=0
    ) as started:
        yield started


def got(client: StoreClient, keys: Sequence[BlockKey]) -> list[bytes | None]:
    return [block for _, block in client.get(keys)]


def test_a_tenant_reads_its_own_blocks_and_no_others(file: TenantsFile, server: Server) -> None:
    blocks = sample_blocks(3)
    keys, absent = keys_of(blocks), [None] * 3
    with file.client(server.address, "a") as a, file.client(server.address, "b") as b:
        assert a.put(blocks) == [STORED] * 3
        assert got(a, keys) == [block for _, block in blocks]
        assert (b.lookup(keys), b.contains(keys), got(b, keys)) == (0, [False] * 3, absent)
        assert b.delete(keys) == [False] * 3
        assert b.purge(NAMESPACE) == 0
        assert a.lookup(keys) == 3
        assert b.put(blocks) == [STORED] * 3, "not PRESENT, which would tell that somebody has them"
        assert b.purge(NAMESPACE) == 3
        assert a.lookup(keys) == 3
        assert a.delete(keys[:1]) == [True]
        assert a.purge(NAMESPACE) == 2


def test_a_batch_larger_than_a_quota_pushes_its_own_first_blocks_out(
    file: TenantsFile, server: Server
) -> None:
    file.add("small", keys=2)
    server.reload()
    blocks = sample_blocks(5)
    with file.client(server.address, "small") as small:
        assert small.put(blocks) == [STORED] * 5
        assert small.contains(keys_of(blocks)) == [False] * 3 + [True] * 2


def test_no_name_that_a_tenant_can_send_is_a_key_of_another(file: TenantsFile, server: Server) -> None:
    key, block = sample_block(1)
    with file.client(server.address, "a") as a, file.client(server.address, "b") as b:
        a.put([(key, block)])
        as_stored = BlockKey(Tenant(name="a").store_namespace(NAMESPACE) + key[32:])
        assert got(b, [as_stored, key]) == [None, None]
        assert b.purge(as_stored[:32]) == 0
        assert got(a, [key]) == [block]


@pytest.mark.parametrize("method", ["Lookup", "Contains", "Get", "Delete", "Purge"])
def test_foreign_and_absent_are_answered_with_the_same_bytes(
    file: TenantsFile, server: Server, method: str
) -> None:
    foreign, absent = sample_blocks(3), [sample_key(number, OTHER_NAMESPACE) for number in range(3)]
    with file.client(server.address, "a") as a:
        a.put(foreign)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(f"/tq_store.rpc.v1.BlockStore/{method}", None, None)
        answers = []
        for keys in (keys_of(foreign), absent):
            request = convert.pack_purge(keys[0][:32]) if method == "Purge" else convert.pack_keys(keys)
            handle = call(request, timeout=WAIT_S, metadata=file.metadata("b"))
            frames = list(handle)
            answers.append((frames, handle.code(), handle.details(), handle.trailing_metadata()))
    assert answers[0] == answers[1]


def test_foreign_and_absent_take_the_same_steps(
    file: TenantsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time follows from what is done: the disk is asked for neither, and for both the same is looked up."""
    steps: list[tuple[str, int]] = []

    class Recording:
        def __init__(self, tier: str, operation: str, num_keys: int) -> None:
            steps.append((f"{tier} {operation}", num_keys))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    foreign, absent = sample_blocks(3), [sample_key(number, OTHER_NAMESPACE) for number in range(3)]
    monkeypatch.setattr("tq_store.server.app.Metrics.watch_tier", lambda _, *facts: Recording(*facts))
    disk = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 20}
    with (
        running_server(tenants_file=file.path, **disk) as server,
        file.client(server.address, "a") as a,
        file.client(server.address, "b") as b,
    ):
        a.put(foreign)
        wait_until(lambda: sum(num_keys for step, num_keys in steps if step == "disk put") == 3)
        taken = []
        for keys in (keys_of(foreign), absent):
            steps.clear()
            got(b, keys)
            b.lookup(keys)
            b.delete(keys)
            taken.append(list(steps))
    assert taken[0] == taken[1] != []


def test_a_load_is_shared_within_a_tenant_only(
    file: TenantsFile, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tenants that get the same key at once do not wait for one another: they load two keys."""
    asked: list[BlockKey] = []
    get = TieredStore.get

    async def recording(store: TieredStore, keys: Sequence[BlockKey]) -> list[bytes | None]:
        asked.extend(keys)
        return await get(store, keys)

    monkeypatch.setattr(TieredStore, "get", recording)
    with file.client(server.address, "a") as a, file.client(server.address, "b") as b:
        got(a, [sample_key(1)])
        got(b, [sample_key(1)])
    assert len(asked) == len(set(asked)) == 2


def test_tenants_of_a_group_share(file: TenantsFile) -> None:
    file.add("c", group="friends")
    file.add("d", group="friends")
    block = sample_block(1)
    with (
        running_server(tenants_file=file.path) as server,
        file.client(server.address, "c") as c,
        file.client(server.address, "d") as d,
        file.client(server.address, "a") as a,
    ):
        assert c.put([block]) == [STORED]
        assert got(d, [block[0]]) == [block[1]]
        assert d.put([block]) == [PRESENT]
        assert a.lookup([block[0]]) == 0


def test_a_tenant_keeps_to_its_namespaces(file: TenantsFile) -> None:
    file.add("narrow", namespaces=[NAMESPACE.hex()])
    outside = [sample_key(1, OTHER_NAMESPACE)]
    with (
        running_server(tenants_file=file.path, metrics_port=0) as server,
        file.client(server.address, "narrow") as client,
    ):
        assert client.put([sample_block(1)]) == [STORED]
        for call in (
            lambda: client.lookup(outside),
            lambda: client.contains([sample_key(1), *outside]),
            lambda: got(client, outside),
            lambda: client.put([sample_block(1, namespace=OTHER_NAMESPACE)]),
            lambda: client.delete(outside),
            lambda: client.purge(OTHER_NAMESPACE),
        ):
            with pytest.raises(RpcDenied, match="narrow may not use this namespace"):
                call()
        assert metric(server, "tq_store_denied_total", reason="not_permitted") == 6


def metric(server: Server, name: str, **labels: str) -> float | None:
    assert server.metrics_url is not None
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_only_admins_see_and_purge_what_is_not_theirs(file: TenantsFile, server: Server) -> None:
    block = sample_block(1)
    stored_as = Tenant(name="a").store_namespace(NAMESPACE)
    with file.client(server.address, "a") as a, file.client(server.address, "ops") as ops:
        a.put([block])
        for call in (a.stats, lambda: a.inspect(block[0])):
            with pytest.raises(RpcDenied, match="takes an admin"):
                call()
        with pytest.raises(RpcDenied, match="to purge everything takes an admin"):
            a.purge(None)
        assert ops.stats().tiers["memory"].namespaces.keys() == {stored_as.hex()}
        (copy,) = ops.inspect(BlockKey(stored_as + block[0][32:]))
        assert (copy.problem, copy.block_bytes) == ("", len(block[1]))
        assert ops.lookup([block[0]]) == 0, "an admin's own keys are its own"
        assert ops.purge(stored_as) == 1
        a.put([block])
        assert ops.purge(None) == 1


def test_blocks_of_tenants_survive_on_disk_and_in_redis(file: TenantsFile, tmp_path: Path) -> None:
    redis = RedisProcess(tmp_path)
    disk = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 20}
    blocks = sample_blocks(3)
    try:
        for lower in (disk, {"redis_url": redis.url}):
            with (
                running_server(tenants_file=file.path, **lower) as server,
                file.client(server.address, "a") as a,
            ):
                assert a.put(blocks) == [STORED] * 3
            with (
                running_server(tenants_file=file.path, **lower) as server,
                file.client(server.address, "a") as a,
                file.client(server.address, "b") as b,
                file.client(server.address, "ops") as ops,
            ):
                assert got(b, keys_of(blocks)) == [None] * 3
                assert got(a, keys_of(blocks)) == [block for _, block in blocks]
                assert ops.stats().counters["quarantined"] == 0
    finally:
        redis.kill()


def test_what_tenants_do_is_counted_for_each(file: TenantsFile, server: Server) -> None:
    blocks = sample_blocks(3, 1000)
    num_bytes = sum(len(block) for _, block in blocks)
    bf16_bytes = 3 * 16 * 64 * 2 * 2
    with file.client(server.address, "a") as a, file.client(server.address, "b") as b:
        a.put(blocks)
        got(a, [*keys_of(blocks), sample_key(9)])
        got(b, keys_of(blocks)[:2])
        a.lookup([*keys_of(blocks), sample_key(9)])
    assert metric(server, "tq_store_tenant_hits_total", tenant="a") == 3
    assert metric(server, "tq_store_tenant_misses_total", tenant="a") == 1
    assert metric(server, "tq_store_tenant_misses_total", tenant="b") == 2
    assert metric(server, "tq_store_tenant_written_bytes_total", tenant="a") == num_bytes
    assert metric(server, "tq_store_tenant_read_bytes_total", tenant="a") == num_bytes
    opened = metric(server, "tq_store_requests_total", method="OpenPipe", status="OK") or 0
    assert metric(server, "tq_store_tenant_requests_total", tenant="a", status="OK") == 3 + opened / 2
    assert metric(server, "tq_store_tenant_blocks", tenant="a") == 3
    assert metric(server, "tq_store_tenant_used_bytes", tenant="a") == num_bytes
    assert metric(server, "tq_store_tenant_used_bytes", tenant="b") == 0
    assert metric(server, "tq_store_saved_bytes_total", direction="put") == bf16_bytes - num_bytes
    assert metric(server, "tq_store_saved_bytes_total", direction="got") == bf16_bytes - num_bytes
    assert metric(server, "tq_store_lookup_keys_total", result="hit") == 3
    assert metric(server, "tq_store_lookup_keys_total", result="miss") == 1


def test_what_was_read_and_not_served_does_not_count(file: TenantsFile, tmp_path: Path) -> None:
    blocks = sample_blocks(6, 700_000)
    num_bytes = sum(len(block) for _, block in blocks)
    path = tmp_path / "s"
    segment = {"shared_memory_bytes": 2_000_000}
    with (
        running_server(listen=f"unix:{path}", tenants_file=file.path, metrics_port=0) as server,
        file.client(server.address, "a", **segment) as client,
    ):
        client.put(blocks)
        found = dict(client.get([sample_key(9), *keys_of(blocks)]))
        assert [found[position] for position in range(1, 7)] == [block for _, block in blocks]
        # two fit the segment at a time, and after a miss it is not known beforehand how many
        assert metric(server, "tq_store_hits_total", tier="memory") > len(blocks)
        assert metric(server, "tq_store_tenant_hits_total", tenant="a") == len(blocks)
        assert metric(server, "tq_store_tenant_read_bytes_total", tenant="a") == num_bytes
        assert metric(server, "tq_store_sent_bytes_total") == num_bytes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "_POLL_S", 0.01)


def may_call(file: TenantsFile, server: Server, name: str, token: str) -> bool:
    with file.client(server.address, name, token=token) as client:
        try:
            client.lookup([sample_key(1)])
        except RpcDenied:
            return False
        return True


@pytest.mark.usefixtures("quick")
def test_tokens_are_rotated_without_a_restart(file: TenantsFile, server: Server) -> None:
    old = file.tokens["a"]
    new = file.add("a")
    wait_until(lambda: may_call(file, server, "a", new))
    assert may_call(file, server, "a", old), "both lines stand"
    file.drop_oldest_token("a")
    wait_until(lambda: not may_call(file, server, "a", old))
    assert may_call(file, server, "a", new)
    assert metric(server, "tq_store_credential_reloads_total", result="ok") == 2


def test_tokens_are_read_again_when_a_server_is_told(file: TenantsFile, server: Server) -> None:
    new = file.add("a")
    server.reload()
    assert may_call(file, server, "a", new)


@pytest.mark.usefixtures("quick")
def test_a_file_that_breaks_changes_nothing_and_is_complained_about_once(
    file: TenantsFile, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    file.write("[broken")
    wait_until(lambda: metric(server, "tq_store_credential_reloads_total", result="failed") == 1)
    assert may_call(file, server, "a", file.tokens["a"])
    file.path.unlink()
    wait_until(lambda: metric(server, "tq_store_credential_reloads_total", result="failed") == 2)
    assert may_call(file, server, "a", file.tokens["a"])
    complaints = [record.message for record in caplog.records if "stay so" in record.message]
    assert len(complaints) == 2
    assert not any(token in caplog.text for token in file.tokens.values())
    file.write()
    wait_until(lambda: metric(server, "tq_store_credential_reloads_total", result="ok") == 1)


def test_a_call_past_the_interceptor_is_nobodys() -> None:
    from tq_store.server.audit import AuditLog, NoSink
    from tq_store.server.reception import Reception

    async def identify() -> None:
        Reception(quotas_over(), AuditLog(NoSink())).identify("Get", "unix:")

    with pytest.raises(LookupError):
        asyncio.run(identify())


def test_a_token_of_nobody_is_denied_as_any_wrong_one(file: TenantsFile, server: Server) -> None:
    token = file.tokens["a"]
    answers = set()
    for wrong in (token[:-1] + "x", token[:-1], "tqs_" + "0" * 16 + token[20:], "not-a-token-at-all-0"):
        with file.client(server.address, "x", token=wrong) as client, pytest.raises(RpcError) as failure:
            client.ping()
        assert isinstance(failure.value, RpcDenied)
        answers.add(str(failure.value))
    assert len(answers) == 1
