import json
import logging
import signal
import subprocess
import sys

import pytest

from tq_store.server.logs import JsonFormatter


def line(message: str, *arguments: object, **facts: object) -> dict[str, object]:
    record = logging.makeLogRecord(
        {"name": "tq_store.server", "levelname": "WARNING", "msg": message, "args": arguments, "created": 1.5}
        | facts
    )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    shown: dict[str, object] = json.loads(text)
    return shown


def test_a_record_is_one_line_of_json() -> None:
    assert line("the %s tier is\n%s", "disk", "full", tier="disk", where=object) == {
        "time": "1970-01-01T00:00:01.500+00:00",
        "level": "WARNING",
        "logger": "tq_store.server",
        "message": "the disk tier is\nfull",
        "tier": "disk",
        "where": str(object),
    }


def test_an_exception_comes_with_its_traceback() -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        exception = line("failed", exc_info=sys.exc_info())["exception"]
    assert isinstance(exception, str)
    assert exception.startswith("Traceback")
    assert exception.endswith("ValueError: what went wrong")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_server_logs_as_it_is_told(log_format: str) -> None:
    arguments = ["serve", "--listen", "127.0.0.1:0", "--log-format", log_format]
    server = subprocess.Popen(
        [sys.executable, "-m", "tq_store", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert "serves on" in server.stdout.readline()
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=20)
    (last,) = err.splitlines()
    if log_format == "json":
        assert json.loads(last)["message"] == "stopping; calls in flight have 20 s"
    else:
        assert last.endswith("INFO tq_store.server.app: stopping; calls in flight have 20 s")
