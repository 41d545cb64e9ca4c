import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import NAMESPACE, keys_of, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.server import app
from tq_store.server.activity import Activity
from tq_store.server.app import Server
from tq_store.server.pages import Pages
from tq_store.server.readings import Reading
from tq_store.server.status_page import render_page
from tq_store.server.status_view import StatusView
from tq_store.settings import format_duration, format_rate, format_ratio
from tq_store.status import Moment, Status


class Readings:
    """Stands in for a sampler: readings that were written down."""

    step_s = 2.0

    def __init__(self, *readings: Reading) -> None:
        self._readings = list(readings)

    def readings(self) -> list[Reading]:
        return self._readings


def reading(clock_s: float, hits: int, misses: int, sent: int, *, evicted: int = 0) -> Reading:
    tier = (("tier", "memory"),)
    return Reading(
        clock_s=clock_s,
        samples={
            "tq_store_lookup_keys_total": {(("result", "hit"),): hits, (("result", "miss"),): misses},
            "tq_store_hits_total": {tier: hits},
            "tq_store_misses_total": {(): misses},
            "tq_store_sent_bytes_total": {(): sent},
            "tq_store_tier_errors_total": {tier: 0},
            "tq_store_tier_evicted_blocks_total": {tier: evicted},
        },
    )


def view(*readings: Reading) -> Status:
    return StatusView(Readings(*readings), Activity()).status()  # type: ignore[arg-type]


def test_rates_cover_the_window_and_ratios_also_all_time() -> None:
    status = view(
        reading(0, 0, 1000, 0),
        reading(100, 10, 1000, 5000, evicted=10),
        reading(110, 90, 1020, 25000, evicted=30),
    )
    assert status.window_s == 10
    assert status.hit_ratio == pytest.approx(0.8)
    assert status.total_hit_ratio == pytest.approx(90 / 1110)
    assert status.sent_bytes_per_s == 2000
    assert status.tiers[0].evicted_blocks_per_s == 2
    assert status.tiers[0].hit_share == pytest.approx(0.8)
    assert [moment.sent_bytes_per_s for moment in status.history] == [50, 2000]


def test_calls_through_pipes_and_shared_memory_count_with_the_others() -> None:
    def calls(clock_s: float, get: int, get_shared: int) -> Reading:
        counts = {"Get": get, "GetShared": get_shared, "GetPiped": get_shared}
        return Reading(
            clock_s=clock_s,
            samples={
                "tq_store_requests_total": {
                    (("method", method), ("status", "OK")): count for method, count in counts.items()
                },
                "tq_store_request_seconds_bucket": {
                    (("le", bound), ("method", method)): count * (bound != "0.01" or method == "Get")
                    for method, count in counts.items()
                    for bound in ("0.01", "0.1", "+Inf")
                },
            },
        )

    lookup, get, put = view(calls(0, 10, 100), calls(10, 30, 140)).calls
    assert (lookup.method, lookup.calls_per_s, lookup.p99_s) == ("Lookup", 0, None)
    assert (get.method, get.calls_per_s, get.p50_s, get.p99_s) == ("Get", 10, 0.1, 0.1)
    assert (put.method, put.calls_per_s) == ("Put", 0)


def test_right_after_the_start_nothing_is_known_and_nothing_breaks() -> None:
    for status in (view(), view(reading(5, 0, 0, 0))):
        assert (status.window_s, status.hit_ratio, status.sent_bytes_per_s) == (0, None, 0)
        assert "no rates yet" in render_page(status)


def test_a_status_survives_json_and_newer_servers() -> None:
    status = view(reading(0, 0, 0, 0), reading(2, 1, 1, 100))
    assert Status.from_json(status.to_json()) == status
    newer = json.loads(status.to_json()) | {"phase_of_the_moon": "full"}
    newer["tiers"][0]["colour"] = "red"
    assert Status.from_json(json.dumps(newer)) == status


@pytest.mark.parametrize("text", ["", "[]", "{}", "17", '{"tiers": 1}', b"\xff\xfe", "[" * 100_000, "null"])
def test_what_is_no_status_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="not the status of a tq-store server"):
        Status.from_json(text)


def test_the_page_escapes_what_it_shows() -> None:
    samples = {"tq_store_build_info": {(("version", "<script>alert(1)</script>"),): 1.0}}
    page = render_page(view(Reading(clock_s=0, samples=samples)))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_numbers_are_written_for_people() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.9, 60, 3605, 90000, 200000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "1 d 1 h",
        "2 d 7 h",
    ]
    assert (format_ratio(None), format_ratio(0.8333)) == ("-", "83.3%")
    assert format_rate(1536.4) == "1.5 KiB/s"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(metrics_port=0, disk_path=tmp_path, disk_budget_bytes=1 << 20) as started:
        yield started


def get(server: Server, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    assert server.metrics_url is not None
    url = server.metrics_url.removesuffix("/metrics") + path
    opener = urlopen(Request(url, method=method), timeout=WAIT_S)
    with opener as answer:
        return (
            answer.status,
            {name.lower(): value for name, value in answer.headers.items()},
            answer.read().decode(),
        )


def test_a_server_shows_what_it_did(server: Server) -> None:
    blocks = sample_blocks(3)
    with StoreClient(server.address) as client:
        client.put(blocks)
        client.lookup([*keys_of(blocks), sample_key(9)])
        list(client.get(keys_of(blocks)))

    def status() -> Status:
        return Status.from_json(get(server, "/status.json")[2])

    wait_until(lambda: status().total_hit_ratio == 0.75)
    (namespace,) = status().namespaces
    assert namespace.digest == NAMESPACE.hex()[:12]
    assert (namespace.asked_keys, namespace.found_keys) == (4, 3)
    assert namespace.sent_bytes == namespace.received_bytes == sum(len(data) for _, data in blocks)
    memory, disk = status().tiers
    assert (memory.name, memory.num_blocks, memory.queue_bytes) == ("memory", 3, None)
    assert (disk.name, disk.budget_bytes, disk.queue_limit_bytes) == ("disk", 1 << 20, 256 << 20)
    page = get(server, "/")[2]
    assert "75.0% since the start" in page
    assert f"{namespace.digest}…" in page
    assert sample_key(1).hex()[64:] not in page
    assert NAMESPACE.hex() not in page


def test_every_path_answers_as_it_should(server: Server) -> None:
    kinds = {
        "/": "text/html; charset=utf-8",
        "/status": "text/html; charset=utf-8",
        "/status.json": "application/json",
        "/status.css": "text/css; charset=utf-8",
        "/status.js": "text/javascript; charset=utf-8",
        "/livez": "text/plain; charset=utf-8",
        "/readyz": "text/plain; charset=utf-8",
    }
    for path, kind in kinds.items():
        code, headers, body = get(server, path)
        assert (code, headers["content-type"]) == (200, kind)
        assert body
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert get(server, path, "HEAD")[2] == ""
    assert "tq_store_build_info" in get(server, "/metrics")[2]
    for path, method, code in (
        ("/../etc/passwd", "GET", 404),
        ("/status.py", "GET", 404),
        ("/", "POST", 405),
    ):
        with pytest.raises(OSError, match=str(code)):
            get(server, path, method)


def test_health_says_no_when_the_server_is_stuck_or_draining() -> None:
    is_well = True
    pages = Pages(
        lambda _, __: [],
        read_status=lambda: view(),
        is_alive=lambda: is_well,
        is_serving=lambda: is_well,
    )

    def ask(path: str) -> str:
        answers: list[str] = []
        pages({"REQUEST_METHOD": "GET", "PATH_INFO": path}, lambda status, _: answers.append(status))  # type: ignore[arg-type,return-value,func-returns-value]
        return answers[0]

    assert [ask("/livez"), ask("/readyz")] == ["200 OK"] * 2
    is_well = False
    assert [ask("/livez"), ask("/readyz")] == ["503 Service Unavailable"] * 2


def test_a_server_whose_loop_is_stuck_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_ALIVE_S", 0.05)
    loop, go_on = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    assert app._answers(loop)
    loop.call_soon_threadsafe(go_on.wait)
    assert not app._answers(loop)
    go_on.set()
    wait_until(lambda: app._answers(loop))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_history_is_drawn_on_one_scale() -> None:
    status = view(reading(0, 0, 0, 0), reading(2, 0, 0, 100), reading(4, 0, 0, 100))
    assert status.history[0] == Moment(sent_bytes_per_s=50, received_bytes_per_s=0, hit_ratio=None)
    assert '<path class="first" d="M0.0 2.0 L300.0 98.0"/>' in render_page(status)
