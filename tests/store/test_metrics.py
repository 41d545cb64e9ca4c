import asyncio
import logging
import re
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from store.running_server import WAIT_S, running_server
from store.sample_blocks import keys_of, sample_block, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.errors import ConfigError, RpcError
from tq_store.results import BackendStats, NamespaceUsage, ShardStats
from tq_store.rpc.convert import METHODS, ServerStats
from tq_store.server import metrics as metrics_module
from tq_store.server.app import Server
from tq_store.server.metrics import Metrics, MetricsEndpoint, StoreCollector


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server(metrics_port=0) as started:
        yield started


def scrape(url: str | None) -> dict[str, float]:
    """Every sample by its name and labels, as they are written."""
    assert url is not None
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_calls_bytes_and_the_store_are_shown(server: Server) -> None:
    blocks = [*sample_blocks(2), sample_block(3, 3 << 20)]
    num_bytes = sum(len(data) for _, data in blocks)
    with StoreClient(server.address) as client:
        client.put(blocks)
        list(client.get([*keys_of(blocks), sample_key(9), blocks[0][0]]))
        client.lookup(keys_of(blocks))
        with pytest.raises(RpcError):
            client.lookup([b"short"])
    samples = scrape(server.metrics_url)
    assert samples["tq_store_requests_total method=Put status=OK"] == 1
    assert samples["tq_store_requests_total method=Lookup status=OK"] == 1
    assert samples["tq_store_requests_total method=Lookup status=INVALID_ARGUMENT"] == 1
    assert samples["tq_store_request_seconds_count method=Lookup"] == 2
    assert 0 < samples["tq_store_request_seconds_sum method=Put"] < WAIT_S
    assert samples["tq_store_received_bytes_total"] == num_bytes
    assert samples["tq_store_sent_bytes_total"] == num_bytes + len(blocks[0][1])
    assert samples["tq_store_active_requests"] == 0
    assert samples["tq_store_inflight_bytes"] == 0
    assert samples["tq_store_tier_blocks tier=memory"] == 3
    assert samples["tq_store_tier_used_bytes tier=memory"] == num_bytes
    assert samples["tq_store_tier_budget_bytes tier=memory"] == 1 << 30
    assert samples["tq_store_tier_evicted_blocks_total tier=memory"] == 0
    assert samples["tq_store_events_total event=misses"] == 1
    with StoreClient(server.address) as client:
        assert samples[f"tq_store_build_info version={client.ping().version}"] == 1


def test_each_name_carries_our_prefix_and_its_unit(server: Server) -> None:
    assert server.metrics_url is not None
    text = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    names = {name for name in names if not name.endswith("_created")}
    assert len(names) == 17
    known = re.compile(r"tq_store_\w*(bytes|seconds|blocks|requests|events|info|open|calls|keys)")
    assert [name for name in names if not known.fullmatch(name)] == []


def test_a_tier_without_a_budget_shows_none() -> None:
    tier = BackendStats(num_blocks=1, used_bytes=2, budget_bytes=None, evicted_blocks=0)

    async def read_stats() -> ServerStats:
        return ServerStats(version="1", uptime_s=1, tiers={"redis": tier}, counters={})

    async def collect() -> list[str]:
        collector = StoreCollector(read_stats, asyncio.get_running_loop())
        families = await asyncio.to_thread(lambda: list(collector.collect()))
        return [sample.name for family in families for sample in family.samples]

    assert "tq_store_tier_budget_bytes" not in asyncio.run(collect())


def test_shards_and_namespaces_are_shown_and_the_labels_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_module, "_MAX_NAMESPACES", 1)
    usage = {
        "aa": NamespaceUsage(num_blocks=1, used_bytes=9),
        "bb": NamespaceUsage(num_blocks=3, used_bytes=20),
    }
    usage["cc"] = NamespaceUsage(num_blocks=2, used_bytes=5)
    tier = BackendStats(num_blocks=6, used_bytes=34, budget_bytes=None, evicted_blocks=0, namespaces=usage)
    shards = [ShardStats(name="h:1", is_open=True, failed_calls=3, lost_keys=7)]

    async def read_stats() -> ServerStats:
        return ServerStats(
            version="1", uptime_s=1, tiers={"redis": tier}, counters={}, shards={"redis": shards}
        )

    async def collect() -> dict[tuple[str, ...], float]:
        collector = StoreCollector(read_stats, asyncio.get_running_loop())
        families = await asyncio.to_thread(lambda: list(collector.collect()))
        return {
            (sample.name.removeprefix("tq_store_"), *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    samples = asyncio.run(collect())
    assert samples["namespace_blocks", "redis", "bb"] == 3
    assert samples["namespace_used_bytes", "redis", "bb"] == 20
    assert samples["namespace_blocks", "redis", "other"] == 3
    assert samples["namespace_used_bytes", "redis", "other"] == 14
    assert not [labels for labels in samples if "aa" in labels or "cc" in labels]
    assert samples["shard_open", "redis", "h:1"] == 1
    assert samples["shard_failed_calls_total", "redis", "h:1"] == 3
    assert samples["shard_lost_keys_total", "redis", "h:1"] == 7


def test_a_store_that_does_not_answer_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_module, "_SCRAPE_TIMEOUT_S", 0.01)

    async def read_stats() -> ServerStats:
        await asyncio.Event().wait()
        raise AssertionError

    async def scrape_it() -> dict[str, float]:
        metrics = Metrics(METHODS)
        metrics.registry.register(StoreCollector(read_stats, asyncio.get_running_loop()))
        endpoint = MetricsEndpoint(metrics.registry, host="127.0.0.1", port=0)
        try:
            return await asyncio.to_thread(scrape, endpoint.url)
        finally:
            endpoint.close()

    with caplog.at_level(logging.WARNING):
        samples = asyncio.run(scrape_it())
    assert samples["tq_store_active_requests"] == 0
    assert not [name for name in samples if name.startswith("tq_store_tier")]
    assert "did not tell its statistics" in caplog.text


def test_a_port_in_use_stops_the_start(server: Server) -> None:
    assert server.metrics_url is not None
    port = int(server.metrics_url.split(":")[2].split("/")[0])
    with (
        pytest.raises(ConfigError, match=f"cannot show metrics on 127.0.0.1:{port}"),
        running_server(metrics_port=port),
    ):
        pass


def test_a_stopped_server_leaves_no_thread_and_no_port() -> None:
    before = threading.active_count()
    with running_server(metrics_port=0) as server:
        url = server.metrics_url
        assert url is not None
        scrape(url)
    with pytest.raises(OSError, match="refused"):
        scrape(url)
    assert threading.active_count() <= before + 1  # grpc keeps a poller for the process


def test_metrics_are_off_unless_asked_for() -> None:
    with running_server() as server:
        assert server.metrics_url is None
