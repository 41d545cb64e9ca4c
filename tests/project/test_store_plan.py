"""Shaped links shape, and the check of `tq-store plan` runs over one."""

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from project.planning_page import PAGE, current

from benchmarks import store_plan, vllm_rows
from benchmarks.shaped_link import ShapedProxy, TokenBucket, in_shaped_namespace, shaped_process
from benchmarks.store_blocks import bench_block
from benchmarks.store_processes import BenchmarkError, TqStore, free_port
from tq_store.client import StoreClient
from tq_store.config import ClientConfig

ROOT = Path(__file__).parents[2]


def test_a_bucket_lets_a_burst_pass_and_then_the_rate() -> None:
    bucket = TokenBucket(0.008)  # a million bytes/s
    assert bucket.delay_s(1_000, 100.0) == pytest.approx(0.0)
    assert bucket.delay_s(1_000_000, 100.0) == pytest.approx(1.0)
    assert bucket.delay_s(500_000, 100.5) == pytest.approx(1.0)
    assert bucket.delay_s(1_000, 200.0) == 0.0, "a pause is not saved up"
    assert bucket.delay_s(1_000_000, 200.0) == pytest.approx(1.0)


@contextmanager
def _within(ports: Sequence[int], gbit: float) -> Iterator[str]:
    with ShapedProxy(ports, gbit) as proxy:
        yield proxy.address


@pytest.mark.parametrize("proxy", [_within, shaped_process])
def test_a_proxy_passes_everything_both_ways_at_the_rate(
    proxy: Callable[[Sequence[int], float], AbstractContextManager[str]],
) -> None:
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    received.append(data)
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        sent = bytes(range(256)) * 8192
        with proxy([listener.getsockname()[1]], 0.08) as address:  # ten million bytes/s
            host, _, port = address.rpartition(":")
            started = time.monotonic()
            with socket.create_connection((host, int(port))) as near:
                writer = threading.Thread(target=near.sendall, args=(sent,))
                writer.start()
                back = b""
                while len(back) < len(sent):
                    back += near.recv(1 << 20)
                writer.join()
            elapsed_s = time.monotonic() - started
        thread.join()
    assert back == sent == b"".join(received)
    assert elapsed_s >= len(sent) / 10e6 - 0.03


def test_a_proxy_holds_nothing_back_until_what_went_before_is_acknowledged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        proxy = stack.enter_context(ShapedProxy([listener.getsockname()[1]], gbit=1.0))
        host, _, port = proxy.address.rpartition(":")
        near = stack.enter_context(socket.create_connection((host, int(port))))
        far = stack.enter_context(listener.accept()[0])
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        took_s = []
        for _ in range(60):  # the kernel acknowledges at once what comes first on a connection
            started = time.monotonic()
            for _ in range(2):
                near.sendall(b"x")
                time.sleep(0.001)  # so that the proxy passes each by itself
            assert far.recv(2, socket.MSG_WAITALL) == b"xx"
            far.sendall(b"y")
            assert near.recv(1) == b"y"
            took_s.append(time.monotonic() - started)
    assert statistics.median(took_s) < 0.03


def test_a_proxy_cuts_what_is_open_when_it_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with ShapedProxy([listener.getsockname()[1]], gbit=1.0) as proxy:
            host, _, port = proxy.address.rpartition(":")
            near = socket.create_connection((host, int(port)))
            far, _ = listener.accept()
            near.sendall(b"x")
            assert far.recv(1) == b"x"
        with near, far:
            assert near.recv(1) == b""
            assert far.recv(1) == b""


def test_a_proxy_whose_server_is_gone_closes_what_comes() -> None:
    gone = free_port()
    with ShapedProxy([gone], gbit=1.0) as proxy:
        host, _, port = proxy.address.rpartition(":")
        with socket.create_connection((host, int(port))) as near:
            assert near.recv(1) == b""


@pytest.mark.parametrize("pipes", [1, 0])
def test_blocks_come_through_a_link_by_pipes_too_and_never_round_it(tmp_path: Path, pipes: int) -> None:
    block = bench_block(0, 1 << 20)
    with TqStore(tmp_path) as server, shaped_process(server.ports, gbit=0.04) as link:  # five million bytes/s
        with StoreClient(server.local_address) as near:
            near.put([block])
        with StoreClient(link, config=ClientConfig(pipes=pipes)) as client:
            started = time.monotonic()
            assert list(client.get([block[0]])) == [(0, block[1])]
            elapsed_s = time.monotonic() - started
            assert len(client._pipes._idle) == pipes
    assert elapsed_s >= len(block[1]) / 5e6 - 0.03


def test_rows_of_vllm_are_loaded_through_a_link() -> None:
    words = ["--presets", "tq4", "--tokens", "512", "--layers", "1", "--rounds", "1"]
    words += ["--gbits", "0.5", "0", "--ways", "pipes", "streams"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_rows", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["way"], row["link_gbit"]) for row in rows] == [
        ("pipes", 0.5),
        ("streams", 0.5),
        ("pipes", None),
        ("streams", None),
    ]
    for row in rows[:2]:
        assert row["link_ms"] == pytest.approx(row["rows"] * row["row_bytes"] * 8 / 0.5e6, abs=0.1)
        assert row["median_ms"] >= 0.8 * row["link_ms"]


def test_a_link_that_is_cut_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_rows, "_send", lambda end, _: end.shutdown(socket.SHUT_RDWR))
    with pytest.raises(BenchmarkError, match="was cut"):
        vllm_rows._alone_ms(1000, 0)


def test_without_the_tools_there_is_no_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert in_shaped_namespace(["true"], 1.0) is None


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_planned_transfer_takes_as_long_as_a_real_one(
    monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    """Over a slow link, where the link decides; by the kernel only where it lets us."""
    if not by_kernel:
        monkeypatch.setattr(store_plan, "in_shaped_namespace", lambda *_: None)
    (row,) = store_plan.rows([0.1], ["tq4"], 4)
    assert row["tokens"] == 256
    assert row["predicted_s"] == pytest.approx(4 * row["block_bytes"] * 8 / 0.1e9)
    assert 0.8 < row["ratio"] < 2


def test_the_check_runs_as_a_program(tmp_path: Path) -> None:
    out = tmp_path / "plan.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store_plan", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["preset"], row["link_gbit"]) == ("tq4", 0.5)
    assert "s planned" in done.stdout


def test_the_page_shows_what_the_command_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == current(text), "run: python -m tests.project.planning_page"
    assert "Gbit/s" in text


def test_a_proxy_that_does_not_start_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="did not start"), shaped_process([1], 1.0):
        pass
