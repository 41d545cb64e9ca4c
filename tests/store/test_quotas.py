import asyncio
from functools import partial
from pathlib import Path

import grpc
import pytest
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import NAMESPACE, OTHER_NAMESPACE, block_bytes, keys_of, sample_block, sample_blocks
from store.some_quotas import Fixed, quotas_over
from store.tenants_file import TenantsFile
from store.test_isolation import metric
from store.test_service import frames_of

from tq_store.backends.disk import DiskBackend
from tq_store.backends.memory import MemoryBackend
from tq_store.backends.policy import S3Fifo
from tq_store.backends.usage import UsageCounter
from tq_store.errors import BackendUnavailable, OverLimit, RpcOverLimit
from tq_store.keys import BlockKey
from tq_store.results import BackendStats, NamespaceUsage, PutOutcome
from tq_store.rpc.status import RETRY_KEY
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server.calls import Call, Identity
from tq_store.server.metric_table import MAX_TENANT_LABELS
from tq_store.server.quotas import Quotas
from tq_store.server.realm_usage import RealmUsage
from tq_store.server.tenants import Tenant

STORED = PutOutcome.STORED


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def quotas_with(clock: Clock | None = None, *usages: NamespaceUsage) -> Quotas:
    return quotas_over(Fixed({}, *usages), clock=clock or Clock())


def test_a_rate_is_a_seconds_worth_at_once_and_then_as_time_goes() -> None:
    clock = Clock()
    quotas, tenant = quotas_with(clock), Tenant(name="a", calls_per_second=4)
    for _ in range(4):
        quotas.begin(call_of(tenant))
    with pytest.raises(OverLimit, match="more than the 4 calls a second that a may make") as refusal:
        quotas.begin(call_of(tenant))
    assert refusal.value.retry_after_s == 0.25
    clock.now_s = 0.25
    quotas.begin(call_of(tenant))
    with pytest.raises(OverLimit):
        quotas.begin(call_of(tenant))
    clock.now_s = 100.0
    for _ in range(4):
        quotas.begin(call_of(tenant))
    with pytest.raises(OverLimit):
        quotas.begin(call_of(tenant))
    quotas.begin(call_of(Tenant(name="b", calls_per_second=1)))
    quotas.begin(call_of(Tenant(name="c")))


def call_of(tenant: Tenant) -> Call:
    return Call(method="Put", identity=Identity(tenant=tenant, token_id=""), peer="unix:", is_admin=False)


def test_calls_in_flight_are_bounded_and_refused_ones_do_not_count() -> None:
    quotas, tenant = quotas_with(), Tenant(name="a", calls_at_once=2)
    first, second, third = (call_of(tenant) for _ in range(3))
    quotas.begin(first)
    quotas.begin(second)
    for _ in range(2):
        with pytest.raises(OverLimit, match="a has 2 calls in flight, as many as it may"):
            quotas.begin(third)
        quotas.end(third)
    quotas.begin(call_of(Tenant(name="b")))
    quotas.end(first)
    quotas.end(first)
    quotas.begin(third)
    with pytest.raises(OverLimit):
        quotas.begin(call_of(tenant))


async def test_what_is_on_its_way_counts_until_it_is_there() -> None:
    quotas = quotas_with(None, NamespaceUsage(num_blocks=2, used_bytes=70))
    tenant = Tenant(name="a", quota_bytes=100)
    large, small, late = (call_of(tenant) for _ in range(3))
    await quotas.reserve(large, 20)
    await quotas.reserve(small, 10)
    with pytest.raises(OverLimit, match="quota of a is used up: 1 bytes more would exceed 100 bytes"):
        await quotas.reserve(late, 1)
    quotas.release(late)
    quotas.release(large)
    quotas.release(large)
    await quotas.reserve(late, 20)


async def test_keys_are_counted_whatever_their_bytes() -> None:
    quotas = quotas_with(None, NamespaceUsage(num_blocks=2, used_bytes=70))
    tenant = Tenant(name="b", quota_keys=3)
    first, second, free = call_of(tenant), call_of(tenant), call_of(Tenant(name="c"))
    await quotas.reserve(first, 1 << 40)
    with pytest.raises(OverLimit, match="1 blocks more would exceed 3 blocks") as refusal:
        await quotas.reserve(second, 1)
    assert refusal.value.retry_after_s == 60
    quotas.release(first)
    await quotas.reserve(second, 1)
    await quotas.reserve(free, 1 << 50)
    quotas.release(free)


async def test_a_group_has_one_usage_and_each_tenant_its_own_quota() -> None:
    tag = Tenant(name="x", group="g").realm_tag
    held = {tag: NamespaceUsage(num_blocks=2, used_bytes=70)}
    quotas = quotas_over(Fixed(held))
    await quotas.reserve(call_of(Tenant(name="x", group="g", quota_bytes=100)), 30)
    with pytest.raises(OverLimit):
        await quotas.reserve(call_of(Tenant(name="y", group="g", quota_bytes=80)), 1)
    assert quotas.usage(Tenant(name="z")).used_bytes == 0


def test_usage_is_that_of_the_medium_with_most_and_labels_are_bounded() -> None:
    media = [NamespaceUsage(num_blocks=2, used_bytes=70), NamespaceUsage(num_blocks=5, used_bytes=50)]
    quotas = quotas_with(None, *media)
    usage = quotas.usage(Tenant(name="a", quota_bytes=9))
    assert (usage.used_bytes, usage.num_blocks, usage.quota_bytes, usage.quota_blocks) == (70, 5, 9, None)
    shown = quotas.usage_by_label(Tenant(name=f"t{n}", quota_keys=1) for n in range(MAX_TENANT_LABELS + 3))
    assert len(shown) == MAX_TENANT_LABELS + 1
    assert (shown[0].tenant, shown[0].used_bytes, shown[0].quota_blocks) == ("t0", 70, 1)
    assert (shown[-1].tenant, shown[-1].used_bytes, shown[-1].quota_blocks) == ("other", 210, None)


def test_usage_follows_blocks() -> None:
    counter = UsageCounter()
    near = BlockKey(NAMESPACE[:8] + bytes(56))
    for key, _ in sample_blocks(3):
        counter.add(key, 10)
    counter.add(near, 5)
    counter.add(sample_block(1, namespace=OTHER_NAMESPACE)[0], 100)
    assert counter.of_group(NAMESPACE[:8]) == NamespaceUsage(num_blocks=4, used_bytes=35)
    assert list(counter.largest(2).values()) == [
        NamespaceUsage(num_blocks=1, used_bytes=100),
        NamespaceUsage(num_blocks=3, used_bytes=30),
    ]
    counter.remove(near, 5)
    for key, _ in sample_blocks(3):
        counter.remove(key, 10)
    assert counter.of_group(NAMESPACE[:8]) == NamespaceUsage(num_blocks=0, used_bytes=0)
    assert list(counter.largest(9)) == [OTHER_NAMESPACE.hex()]
    counter.clear()
    assert counter.largest(9) == {}


class Uncounted:
    """A medium that tells what namespaces hold when it is asked, and while it works."""

    name = "uncounted"
    works = True

    def __init__(self) -> None:
        self.memory = MemoryBackend(budget_bytes=1 << 20)

    async def stats(self) -> BackendStats:
        if not self.works:
            raise BackendUnavailable("gone")
        return await self.memory.stats()


async def test_a_medium_that_does_not_count_is_asked_and_its_last_answer_stands() -> None:
    medium = Uncounted()
    realms = RealmUsage([medium])
    assert list(realms.of(NAMESPACE[:8])) == []
    await medium.memory.put(sample_blocks(3))
    watching = asyncio.create_task(realms.watch())
    while not list(realms.of(NAMESPACE[:8])):
        await asyncio.sleep(0)
    watching.cancel()
    medium.works = False
    await realms.refresh()
    held = NamespaceUsage(num_blocks=3, used_bytes=3 * block_bytes(256))
    assert list(realms.of(NAMESPACE[:8])) == [held]
    assert list(realms.of(OTHER_NAMESPACE[:8])) == []


@pytest.fixture
def file(tmp_path: Path) -> TenantsFile:
    return TenantsFile(tmp_path)


@pytest.mark.parametrize("road", ["streams", "shared memory"])
def test_a_full_quota_makes_room_among_its_own(file: TenantsFile, tmp_path: Path, road: str) -> None:
    listen = "127.0.0.1:0" if road == "streams" else f"unix:{tmp_path}/socket"
    file.add("small", bytes=10 * block_bytes(256))
    file.add("few", keys=5)
    file.add("free")
    blocks = sample_blocks(40)
    with (
        running_server(listen=listen, tenants_file=file.path, metrics_port=0) as server,
        file.client(server.address, "small") as small,
        file.client(server.address, "few") as few,
        file.client(server.address, "free") as free,
    ):
        assert free.put(blocks) == [STORED] * 40
        for client, quota in ((small, 10), (few, 5)):
            for number in range(0, 40, 4):
                assert client.put(blocks[number : number + 4]) == [STORED] * 4
                assert client.contains(keys_of(blocks)).count(True) <= quota
            assert client.contains(keys_of(blocks)[-4:]) == [True] * 4, "the newest stay"
        assert free.lookup(keys_of(blocks)) == 40
        assert (metric(server, "tq_store_tenant_used_bytes", tenant="small") or 0) <= 10 * block_bytes(256)
        assert (metric(server, "tq_store_tenant_evicted_blocks_total", tenant="few") or 0) >= 35
        assert metric(server, "tq_store_tenant_quota_bytes", tenant="small") == 10 * block_bytes(256)
        assert metric(server, "tq_store_tenant_quota_blocks", tenant="few") == 5
        assert metric(server, "tq_store_inflight_bytes") == 0


@pytest.mark.parametrize("road", ["streams", "shared memory"])
def test_what_is_more_than_a_quota_is_refused_and_removes_nothing(
    file: TenantsFile, tmp_path: Path, road: str
) -> None:
    listen = "127.0.0.1:0" if road == "streams" else f"unix:{tmp_path}/socket"
    file.add("small", bytes=3 * block_bytes(256))
    blocks = sample_blocks(3)
    with (
        running_server(listen=listen, tenants_file=file.path, metrics_port=0) as server,
        file.client(server.address, "small") as small,
    ):
        small.put(blocks)
        with pytest.raises(RpcOverLimit, match="is used up: 2256 bytes more would exceed 1536"):
            small.put([sample_block(9, 2000)])
        assert small.lookup(keys_of(blocks)) == 3
        assert metric(server, "tq_store_tenant_limited_total", tenant="small", limit="bytes") == 1


def test_a_quota_counts_what_a_restart_finds_on_disk(file: TenantsFile, tmp_path: Path) -> None:
    file.add("small", bytes=4 * block_bytes(256))
    disk = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 20, "tenants_file": file.path}
    blocks = sample_blocks(8)
    with running_server(**disk) as server, file.client(server.address, "small") as client:
        client.put(blocks[:4])
    with (
        running_server(**disk, metrics_port=0) as server,
        file.client(server.address, "small") as client,
    ):
        for block in blocks[4:]:
            assert client.put([block]) == [STORED]
            wait_until(lambda: metric(server, "tq_store_write_queue_bytes", tier="disk") == 0)
        assert client.contains(keys_of(blocks)) == [False] * 4 + [True] * 4


async def test_what_a_faster_medium_has_goes_last(tmp_path: Path) -> None:
    memory = MemoryBackend(budget_bytes=1 << 20)
    disk = await DiskBackend.open(tmp_path, budget_bytes=1 << 20)
    blocks = sample_blocks(6)
    await disk.put(blocks)
    await memory.put(blocks[-2:])
    realms = RealmUsage([memory, disk])
    tag = NAMESPACE[:8]
    keys = await realms.first_to_go(tag, num_bytes=0, num_blocks=2)
    assert len(keys) == 2
    assert not set(keys) & set(keys_of(blocks[-2:]))
    everything = await realms.first_to_go(tag, num_bytes=1 << 20, num_blocks=0)
    assert len(everything) == 3, "half of what there is; the rest when it is asked again"
    assert await realms.first_to_go(OTHER_NAMESPACE[:8], num_bytes=1, num_blocks=0) == []
    await disk.close()
    assert await realms.first_to_go(tag, num_bytes=0, num_blocks=2) == [], (
        "a medium that fails chooses nothing"
    )


async def test_a_medium_that_counts_late_chooses_for_itself() -> None:
    memory, medium = MemoryBackend(budget_bytes=1 << 20), Uncounted()
    await memory.put(sample_blocks(1))
    await medium.memory.put(sample_blocks(3))
    realms = RealmUsage([memory, medium])
    assert await realms.first_to_go(NAMESPACE[:8], num_bytes=1, num_blocks=0) == [sample_block(0)[0]]
    await realms.refresh()
    assert await realms.first_to_go(NAMESPACE[:8], num_bytes=1, num_blocks=0) == []
    assert await RealmUsage([medium]).first_to_go(NAMESPACE[:8], num_bytes=1, num_blocks=0) == []


def test_what_was_not_used_is_first_to_go() -> None:
    policy = S3Fifo(1 << 20)
    own, others = sample_blocks(6), sample_blocks(3, namespace=OTHER_NAMESPACE)
    for key, block in [*own, *others]:
        policy.admit(key, len(block))
    keys = keys_of(own)
    for used in keys[:3]:
        policy.touch(used)
    choose = partial(policy.first_to_go, NAMESPACE[:8])
    assert choose(num_bytes=0, num_blocks=2) == keys[3:5]
    assert choose(num_bytes=4 * 512, num_blocks=1) == [*keys[3:], keys[0]]
    assert choose(num_bytes=1 << 20, num_blocks=0) == [*keys[3:], *keys[:3]]
    assert choose(num_bytes=0, num_blocks=0) == []


def test_a_tenant_that_calls_too_often_is_told_when_to_come_back(file: TenantsFile) -> None:
    file.add("eager", calls_per_second=1)
    file.add("calm")
    with (
        running_server(tenants_file=file.path, metrics_port=0) as server,
        grpc.insecure_channel(server.address) as channel,
        file.client(server.address, "calm") as calm,
    ):
        stub = stubs.BlockStoreStub(channel)
        metadata = file.metadata("eager")
        calls = [stub.Put.future(frames_of(sample_blocks(1)), metadata=metadata) for _ in range(20)]
        refused = [call for call in calls if call.exception(WAIT_S)]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        hints = [
            int(value) for call in refused for key, value in call.trailing_metadata() if key == RETRY_KEY
        ]
        assert len(hints) == len(refused) > 10
        assert all(0 < hint <= 1000 for hint in hints)
        assert calm.put(sample_blocks(1)) == [STORED]
        assert metric(server, "tq_store_tenant_limited_total", tenant="eager", limit="rate") == len(hints)
