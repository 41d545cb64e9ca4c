import asyncio
import logging
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from project.metrics_document import DOCUMENT, document
from prometheus_client import make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import keys_of, sample_block, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.errors import ConfigError, RpcError
from tq_store.results import BackendStats, NamespaceUsage, ShardStats
from tq_store.rpc.convert import METHODS
from tq_store.server import metric_table as table
from tq_store.server import scrape as scrape_module
from tq_store.server.app import Server
from tq_store.server.endpoint import MetricsEndpoint
from tq_store.server.metric_table import DEFINITIONS, MAX_TENANT_LABELS, Type
from tq_store.server.metrics import Metrics
from tq_store.server.scrape import StoreCollector
from tq_store.tiering.store import StoreStats


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
    assert samples["tq_store_tier_seconds_count operation=get tier=memory"] >= 1
    assert samples["tq_store_hits_total tier=memory"] == 4
    assert samples["tq_store_misses_total"] == 1
    assert samples["tq_store_max_requests"] == 256
    assert samples["tq_store_max_inflight_bytes"] == 24 << 20
    with StoreClient(server.address) as client:
        assert samples[f"tq_store_build_info version={client.ping().version}"] == 1


def test_the_table_is_what_a_server_really_shows(tmp_path: Path) -> None:
    with running_server(metrics_port=0, disk_path=tmp_path, disk_budget_bytes=1 << 20) as server:
        assert server.metrics_url is not None
        text = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
    shown = {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
        for family in text_string_to_metric_families(text)
        if not family.name.startswith("process_") and not family.name.endswith("_created")
    }
    assert shown == {metric.name: (metric.type.value, metric.meaning) for metric in DEFINITIONS}
    for metric in DEFINITIONS:
        assert metric.name.startswith("tq_store_")
        assert metric.name.endswith("_total") == (metric.type is Type.COUNTER)
        assert ("seconds" in metric.name) == (metric.type is Type.HISTOGRAM)


def test_the_document_is_made_from_the_table() -> None:
    remedy = "run `python -m tests.project.metrics_document`"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), remedy


def test_labels_of_tenants_are_bounded() -> None:
    metrics = Metrics(METHODS)
    for number in range(3 * MAX_TENANT_LABELS):
        metrics.limited(f"tenant{number % (2 * MAX_TENANT_LABELS)}", "rate")
    value = metrics.registry.get_sample_value
    metrics.audit_dropped()
    assert value("tq_store_audit_dropped_total") == 1
    assert value("tq_store_tenant_limited_total", {"tenant": "tenant0", "limit": "rate"}) == 2
    others = value("tq_store_tenant_limited_total", {"tenant": "other", "limit": "rate"})
    assert others == MAX_TENANT_LABELS


def test_events_without_a_metric_keep_their_name_and_tiers_are_labels() -> None:
    counters = {"hits_disk": 3, "tier_errors_redis": 2, "misses": 5, "breaker_opened": 7}
    stats = StoreStats(tiers={}, counters=counters)
    values = asyncio.run(collect(stats))
    assert values["tq_store_hits_total", "disk"] == 3
    assert values["tq_store_tier_errors_total", "redis"] == 2
    assert values["tq_store_misses_total",] == 5
    assert values["tq_store_events_total", "breaker_opened"] == 7


def test_shards_and_namespaces_are_shown_and_the_labels_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "MAX_NAMESPACE_LABELS", 1)
    usage = {
        "aa": NamespaceUsage(num_blocks=1, used_bytes=9),
        "bb": NamespaceUsage(num_blocks=3, used_bytes=20),
        "cc": NamespaceUsage(num_blocks=2, used_bytes=5),
    }
    tier = BackendStats(num_blocks=6, used_bytes=34, budget_bytes=None, evicted_blocks=0, namespaces=usage)
    shards = [ShardStats(name="h:1", is_open=True, failed_calls=3, lost_keys=7)]
    values = asyncio.run(collect(StoreStats(tiers={"redis": tier}, counters={}, shards={"redis": shards})))
    assert values["tq_store_namespace_blocks", "redis", "bb"] == 3
    assert values["tq_store_namespace_used_bytes", "redis", "bb"] == 20
    assert values["tq_store_namespace_blocks", "redis", "other"] == 3
    assert values["tq_store_namespace_used_bytes", "redis", "other"] == 14
    assert not [labels for labels in values if "aa" in labels or "cc" in labels]
    assert values["tq_store_shard_open", "redis", "h:1"] == 1
    assert values["tq_store_shard_failed_calls_total", "redis", "h:1"] == 3
    assert values["tq_store_shard_lost_keys_total", "redis", "h:1"] == 7


async def collect(stats: StoreStats) -> dict[tuple[str, ...], float]:
    async def read_stats() -> StoreStats:
        return stats

    collector = StoreCollector(read_stats, tuple, asyncio.get_running_loop(), version="1")
    families = await asyncio.to_thread(lambda: list(collector.collect()))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_tier_without_a_budget_shows_none() -> None:
    tier = BackendStats(num_blocks=1, used_bytes=2, budget_bytes=None, evicted_blocks=0)

    values = asyncio.run(collect(StoreStats(tiers={"redis": tier}, counters={})))
    assert ("tq_store_tier_used_bytes", "redis") in values
    assert ("tq_store_tier_budget_bytes", "redis") not in values


def test_a_store_that_does_not_answer_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scrape_module, "_SCRAPE_TIMEOUT_S", 0.01)

    async def read_stats() -> StoreStats:
        await asyncio.Event().wait()
        raise AssertionError

    async def scrape_it() -> dict[str, float]:
        metrics = Metrics(METHODS)
        loop = asyncio.get_running_loop()
        metrics.registry.register(StoreCollector(read_stats, tuple, loop, version="1"))
        endpoint = MetricsEndpoint(make_wsgi_app(metrics.registry), host="127.0.0.1", port=0)
        try:
            return await asyncio.to_thread(scrape, endpoint.url)
        finally:
            endpoint.close()

    with caplog.at_level(logging.WARNING):
        samples = asyncio.run(scrape_it())
    assert samples["tq_store_active_requests"] == 0
    assert not [name for name in samples if name.startswith("tq_store_tier")]
    assert "did not tell its statistics" in caplog.text


def test_a_client_that_goes_away_is_no_news_and_a_fault_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def application(environ: object, start_response: object) -> list[bytes]:
        raise AssertionError

    endpoint = MetricsEndpoint(application, host="127.0.0.1", port=0)
    try:
        for error in (TimeoutError("timed out"), ConnectionResetError(), KeyError("a fault of ours")):
            try:
                raise error
            except Exception:
                endpoint._server.handle_error(None, ("127.0.0.1", 1))
    finally:
        endpoint.close()
    assert [record.getMessage() for record in caplog.records] == ["a request on the metrics port failed"]
    assert "a fault of ours" in caplog.text
    assert not capsys.readouterr().err


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
    # grpc keeps a poller for the process; the thread that answered us may outlive its answer by a moment
    wait_until(lambda: threading.active_count() <= before + 1)


def test_metrics_are_off_unless_asked_for() -> None:
    with running_server() as server:
        assert server.metrics_url is None
