import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import NAMESPACE, keys_of, sample_blocks, sample_key

from tq_store import cli, top
from tq_store.client import StoreClient
from tq_store.errors import ConfigError, RpcUnavailable
from tq_store.status import Status


@pytest.fixture
def url() -> Iterator[str]:
    with running_server(metrics_port=0) as server, StoreClient(server.address) as client:
        assert server.metrics_url is not None
        url = server.metrics_url.removesuffix("/metrics")
        client.put(sample_blocks(3))
        client.lookup([*keys_of(sample_blocks(3)), sample_key(9)])
        wait_until(lambda: top.fetch_status(url).total_hit_ratio == 0.75)
        yield url


def test_once_and_json_show_the_same_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--url", url, "--once"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["memory", "-", "3", "1.5", "KiB", "1", "GiB", "0.0/s", "-", "0"] in lines
    assert NAMESPACE.hex()[:12] in shown
    assert "no trouble since the start" in shown
    assert "\x1b" not in shown
    assert cli.main(["top", "--url", f"{url}/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_hit_ratio"] == 0.75


def test_troubles_stand_out(url: str) -> None:
    status = top.fetch_status(url)
    status.troubles["corrupt blocks"] = 1234
    console = Console(width=100, file=io.StringIO())
    console.print(top.draw(status))
    assert "since the start: corrupt blocks 1,234" in console.file.getvalue()  # type: ignore[attr-defined]


def test_it_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--url", "http://127.0.0.1:1"]) == 3
    assert "was it started with --metrics-port, and is --url right?" in capsys.readouterr().err
    assert cli.main(["top", "--url", "file:///etc/passwd"]) == 2
    assert "is not the URL of a metrics port" in capsys.readouterr().err
    for pause in ("0", "nan", "x"):
        with pytest.raises(SystemExit):
            cli.main(["top", "--every", pause])


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 404 No\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n{}", b"junk\r\n"]
)
def test_what_is_no_server_of_ours_is_said_so(answer: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    foreign = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=foreign.serve_forever, args=(0.01,))
    thread.start()
    try:
        with pytest.raises((ConfigError, RpcUnavailable)):
            top.fetch_status(f"http://127.0.0.1:{foreign.server_port}")
    finally:
        foreign.shutdown()
        foreign.server_close()
        thread.join()


def test_on_a_terminal_it_watches_until_ctrl_c_and_outlives_the_server() -> None:
    ours, theirs = pty.openpty()
    with running_server(metrics_port=0) as server:
        assert server.metrics_url is not None
        command = [sys.executable, "-m", "tq_store", "top", "--every", "0.1"]
        command += ["--url", server.metrics_url.removesuffix("/metrics")]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environment)
        os.close(theirs)
        read_until(ours, b"no trouble since the start")
    read_until(ours, b"old numbers: ")
    process.send_signal(signal.SIGINT)
    rest = read_until(ours, b"\x1b[?1049l")
    assert b"Traceback" not in rest
    os.close(ours)
    assert process.wait(WAIT_S) == 0


def test_ctrl_c_is_no_error_even_while_the_server_is_away(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    status = top.fetch_status(url)
    answers = iter([status, status, RpcUnavailable("gone"), KeyboardInterrupt()])

    def fetch(_: str) -> Status:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(top, "fetch_status", fetch)
    top.watch(url, every_s=0)
    assert list(answers) == []


def read_until(terminal: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], WAIT_S)
        assert ready, seen[-500:]
        seen += os.read(terminal, 1 << 16)
    return seen
