"""Every alert is provoked by a drill against a real server, whose scrapes Prometheus' own engine judges."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import xxhash
from store.redis_process import RedisProcess
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import keys_of, sample_block, sample_blocks, sample_key
from store.tenants_file import TenantsFile

from deploy.prometheus import ALERTS, Scrape, alert_names, check, scrape, series
from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import RpcError
from tq_store.results import PutOutcome
from tq_store.rpc.v1 import block_store_pb2 as pb
from tq_store.rpc.v1 import block_store_pb2_grpc as stubs
from tq_store.server.app import Server

RUNBOOK = ALERTS.parents[1] / "RUNBOOK.md"
HASTY = ClientConfig(max_attempts=1, lookup_timeout_s=WAIT_S)
SLOW = "TQStoreSlowLookups"
MEMORY = "TQStoreMemoryOverBudget"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path / "redis")
    yield server
    server.kill()


class Drill:
    """What a server shows before and after what is done to it."""

    def __init__(self, directory: Path, server: Server) -> None:
        self._directory = directory
        self._url = server.metrics_url
        self._before = scrape(self._url)

    def provokes(self, *firing: str, maybe: tuple[str, ...] = ()) -> None:
        """These and nothing else, but perhaps those in `maybe` and what a busy test process provokes."""
        after = scrape(self._url)
        check(self._directory, series(self._before, after), firing=firing, maybe=(*maybe, MEMORY, SLOW))


def fails(*calls: object) -> None:
    """Each of these calls ends in an error."""
    for call in calls:
        with pytest.raises(RpcError):
            call()  # type: ignore[operator]


def test_a_busy_healthy_server_provokes_nothing(tmp_path: Path, redis: RedisProcess) -> None:
    tenants = TenantsFile(tmp_path)
    tenants.add("search", bytes="1GiB", calls_per_second=100_000)
    settings = {"disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 30, "redis_url": redis.url}
    settings |= {"memory_budget_bytes": 8 << 30}
    settings |= {"tenants_file": tenants.path, "audit_log": tmp_path / "audit.log"}
    with (
        running_server(metrics_port=0, **settings) as server,
        tenants.client(server.address, "search") as client,
    ):
        drill = Drill(tmp_path, server)
        for first in range(0, 300, 10):
            blocks = sample_blocks(10, first=first)
            client.put(blocks)
            for _ in range(10):
                assert client.lookup(keys_of(blocks)) == 10
            list(client.get(keys_of(blocks)))
        drill.provokes()


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    with running_server(metrics_port=0) as server:
        url = server.metrics_url
        assert scrape(url).values
    check(tmp_path, series(Scrape(), scrape(url)), firing=["TQStoreDown"])


def test_a_server_that_is_killed_again_and_again(tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("tq-store"),
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--metrics-port",
        "0",
    ]
    starts = []
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        shown = scrape(url)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (start,) = (
            value for (name, _), value in shown.values.items() if name == "process_start_time_seconds"
        )
        starts += 5 * [start]
    lines = series(shown, shown)
    (name,) = (name for name in lines if name.startswith("process_start_time_seconds"))
    # the last of nine series of four starts ends where the alerts are looked at
    lines[name] = " ".join(map(repr, 9 * starts))
    check(tmp_path, lines, firing=["TQStoreRestarting"])


def test_more_memory_than_the_settings_explain(tmp_path: Path) -> None:
    held = bytearray(b"x") * (600 << 20)  # by this process, which the server is part of
    with running_server(metrics_port=0, memory_budget_bytes=1 << 20, max_inflight_bytes=1 << 20) as server:
        Drill(tmp_path, server).provokes(MEMORY)
    assert held


@pytest.mark.parametrize("alert", ["TQStoreCorruptBlocks", "TQStoreUnsupportedBlocks"])
def test_blocks_on_disk_that_cannot_be_used(tmp_path: Path, alert: str) -> None:
    settings = {"metrics_port": 0, "disk_path": tmp_path / "disk", "disk_budget_bytes": 1 << 30}
    ((key, block),) = blocks = sample_blocks(1)
    with running_server(**settings) as server, StoreClient(server.address) as client:
        client.put(blocks)
    (file,) = (
        path
        for path in (tmp_path / "disk").rglob("*")
        if path.is_file() and path.stat().st_size == len(block)
    )
    changed = bytearray(block)
    if alert == "TQStoreCorruptBlocks":
        changed[300] ^= 1
    else:
        changed[8] += 1
        changed[248:256] = xxhash.xxh3_64_intdigest(changed[:248]).to_bytes(8, "little")
    file.write_bytes(changed)
    with running_server(**settings) as server, StoreClient(server.address) as client:
        drill = Drill(tmp_path, server)
        assert list(client.get([key])) == [(0, None)]
        drill.provokes(alert)


def test_a_client_that_sends_damaged_blocks(tmp_path: Path) -> None:
    with running_server(metrics_port=0) as server, StoreClient(server.address) as client:
        drill = Drill(tmp_path, server)
        key, block = sample_block(1)
        assert client.put([(key, block[:-1] + b"!")]) == [PutOutcome.INVALID]
        drill.provokes("TQStoreInvalidPuts")


def test_a_shared_tier_that_is_killed(tmp_path: Path, redis: RedisProcess) -> None:
    with (
        running_server(metrics_port=0, redis_url=redis.url) as server,
        StoreClient(server.address, config=HASTY) as client,
    ):
        drill = Drill(tmp_path, server)
        redis.kill()
        for turn in range(5):
            client.put(sample_blocks(20, first=20 * turn))
            client.lookup([sample_key(10_000 + turn)])
        wait_until(
            lambda: not client.lookup([sample_key(20_000)]) and _value(server, "tq_store_shard_open") > 0
        )
        wait_until(lambda: client.stats().counters["dropped_writes"] > 0)
        fails(lambda: client.purge(None))
        drill.provokes(
            "TQStoreTierFailing",
            "TQStoreShardOpen",
            "TQStoreDroppedWrites",
            "TQStoreInternalErrors",
            maybe=("TQStoreLowHitRatio",),
        )


def test_a_shared_tier_that_hangs(tmp_path: Path, redis: RedisProcess) -> None:
    with (
        running_server(metrics_port=0, redis_url=redis.url) as server,
        StoreClient(server.address, config=HASTY) as client,
    ):
        drill = Drill(tmp_path, server)
        redis.pause()
        client.lookup([sample_key(100)])
        redis.resume()
        drill.provokes(SLOW, maybe=("TQStoreTierFailing", "TQStoreShardOpen"))


def test_a_shared_tier_that_writes_too_slowly(tmp_path: Path, redis: RedisProcess) -> None:
    settings = {"redis_url": redis.url, "redis_timeout_s": WAIT_S, "write_queue_bytes": 100_000}
    with running_server(metrics_port=0, **settings) as server, StoreClient(server.address) as client:
        drill = Drill(tmp_path, server)
        redis.command("CLIENT", "PAUSE", "60000", "WRITE")
        client.put(sample_blocks(18, 5000))
        drill.provokes("TQStoreWriteQueueFull")
        redis.command("CLIENT", "UNPAUSE")


def test_a_memory_tier_that_is_too_small(tmp_path: Path) -> None:
    with (
        running_server(metrics_port=0, memory_budget_bytes=8000) as server,
        StoreClient(server.address) as client,
    ):
        drill = Drill(tmp_path, server)
        client.put(sample_blocks(100))
        assert client.put([sample_block(1000, 9000)]) == [PutOutcome.REFUSED]
        drill.provokes("TQStoreChurn", "TQStoreRefusedPuts")


def test_replicas_that_find_nothing(tmp_path: Path) -> None:
    with running_server(metrics_port=0) as server, StoreClient(server.address) as client:
        drill = Drill(tmp_path, server)
        for turn in range(10):
            client.lookup([sample_key(10 * turn + number) for number in range(10)])
        drill.provokes("TQStoreLowHitRatio")


def test_more_calls_than_the_server_takes(tmp_path: Path) -> None:
    with running_server(metrics_port=0, max_concurrent_calls=1) as server:
        drill = Drill(tmp_path, server)
        with grpc.insecure_channel(server.address) as channel:
            stub = stubs.BlockStoreStub(channel)
            # a put whose frames never come takes the one place
            waiting = stub.Put.future(iter(_Endless()), timeout=WAIT_S)
            with StoreClient(server.address, config=HASTY) as client:
                wait_until(lambda: _is_refused(client))
            waiting.cancel()
        drill.provokes("TQStoreOverloaded")


class _Endless:
    """Frames: one, and no second."""

    def __iter__(self) -> Iterator[pb.BlockFrame]:
        key, block = sample_block(1)
        yield pb.BlockFrame(key=key, block_bytes=len(block), data=block[:10])
        with open(os.devnull, "rb") as never:
            signal.sigtimedwait([], WAIT_S)
        assert never


def _is_refused(client: StoreClient) -> bool:
    try:
        client.ping()
    except RpcError:
        return True
    return False


def test_strangers_and_broken_credentials(tmp_path: Path) -> None:
    tenants = TenantsFile(tmp_path)
    tenants.add("search")
    with running_server(metrics_port=0, tenants_file=tenants.path) as server:
        drill = Drill(tmp_path, server)
        with StoreClient(server.address, config=HASTY) as stranger:
            fails(*[stranger.ping] * 20)
        tenants.write("this is no TOML")
        wait_until(lambda: _value(server, "tq_store_credential_reloads_total", "failed") > 0)
        with tenants.client(server.address, "search") as known:
            known.ping()
        drill.provokes("TQStoreDenied", "TQStoreReloadFailed")


def _value(server: Server, name: str, label: str = "") -> float:
    """Of a metric, over all labels or those that hold this one."""
    shown = scrape(server.metrics_url).values.items()
    return sum(
        value
        for (found, labels), value in shown
        if found == name and (not label or label in dict(labels).values())
    )


def test_an_audit_log_on_a_full_disk(tmp_path: Path) -> None:
    with (
        running_server(metrics_port=0, audit_log=Path("/dev/full")) as server,
        StoreClient(server.address) as client,
    ):
        drill = Drill(tmp_path, server)
        client.purge(None)
        wait_until(lambda: _value(server, "tq_store_audit_dropped_total") > 1)
        drill.provokes("TQStoreAuditDropped")


def test_a_tenant_at_its_quota(tmp_path: Path) -> None:
    tenants = TenantsFile(tmp_path)
    tenants.add("search", bytes="10KiB")
    with (
        running_server(metrics_port=0, tenants_file=tenants.path) as server,
        tenants.client(server.address, "search") as client,
    ):
        drill = Drill(tmp_path, server)
        client.put(sample_blocks(100))
        fails(lambda: client.put([sample_block(1000, 20_000)]))
        drill.provokes("TQStoreTenantLimited", "TQStoreTenantChurn", "TQStoreOverloaded")


def test_no_alert_is_without_a_drill() -> None:
    drills = re.sub(r"maybe=[(\[].*?[)\]]", "", Path(__file__).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [name for name in alert_names() if f'"{name}"' not in drills] == []


def test_each_alert_has_a_heading_in_the_runbook() -> None:
    headings = set(re.findall(r"^### (TQStore\w+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert headings == set(alert_names())
    for anchor in re.findall(
        r"runbook: RUNBOOK\.md#(\w+)$", ALERTS.read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        assert anchor in {heading.lower() for heading in headings}
