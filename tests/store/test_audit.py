import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from store.running_server import TOKEN, running_server, wait_until, write_token
from store.sample_blocks import NAMESPACE, OTHER_NAMESPACE, keys_of, sample_block, sample_blocks, sample_key
from store.tenants_file import TenantsFile

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.errors import ConfigError, RpcDenied, RpcOverLimit
from tq_store.server.audit import AuditLog, FileSink, NoSink
from tq_store.server.calls import Call, Identity
from tq_store.server.tenants import Tenant


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_who_did_what_with_which_outcome(tmp_path: Path) -> None:
    file, log = TenantsFile(tmp_path), tmp_path / "audit.jsonl"
    file.add("a", bytes=1500)
    file.add("ops", admin=True)
    blocks = sample_blocks(3)
    with (
        running_server(tenants_file=file.path, audit_log=log) as server,
        file.client(server.address, "a") as a,
        file.client(server.address, "ops") as ops,
        file.client(server.address, "x", token=file.tokens["a"][:-1] + "x") as stranger,
    ):
        a.put(blocks[:2])
        a.lookup(keys_of(blocks))
        with pytest.raises(RpcOverLimit):
            a.put([sample_block(9, 2000)])
        with pytest.raises(RpcDenied):
            a.stats()
        a.delete(keys_of(blocks)[:2])
        ops.purge(None)
        with pytest.raises(RpcDenied):
            stranger.lookup([sample_key(1)])
    start, over, forbidden, deletion, purge, denied, stop = records(log)
    token_id = file.tokens["a"].split("_")[1]
    assert (start["event"], start["tenants"], stop["event"]) == ("start", 2, "stop")
    assert (over["method"], over["outcome"], over["tenant"]) == ("Put", "RESOURCE_EXHAUSTED", "a")
    assert (forbidden["method"], forbidden["outcome"]) == ("Stats", "PERMISSION_DENIED")
    assert deletion == deletion | {
        "event": "call",
        "method": "Delete",
        "outcome": "OK",
        "tenant": "a",
        "token": token_id,
        "admin": False,
        "keys": 2,
        "key": blocks[0][0].hex()[64:80],
    }
    assert deletion["peer"].startswith("ipv4:127.0.0.1:")
    assert deletion["time"].endswith("+00:00")
    assert (purge["method"], purge["tenant"], purge["admin"]) == ("Purge", "ops", True)
    assert (deletion["scope"], purge["scope"]) == (NAMESPACE.hex()[:16], "all")
    assert (denied["method"], denied["outcome"]) == ("Lookup", "UNAUTHENTICATED")
    assert "tenant" not in denied
    text = log.read_text()
    for secret in (*file.tokens.values(), *(token.split("_")[2] for token in file.tokens.values())):
        assert secret not in text
    assert NAMESPACE.hex() not in text
    assert blocks[0][0].hex()[64:] not in text
    assert log.stat().st_mode & 0o777 == 0o600


def test_every_call_where_that_is_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    config = ClientConfig(token_file=write_token(tmp_path))
    with (
        running_server(token_file=config.token_file, audit_log=log, audit_all=True) as server,
        StoreClient(server.address, config=config) as client,
    ):
        key, block = sample_block(1)
        client.put([(key, block)])
        list(client.get([key]))
    _, put, opened, get, _ = records(log)
    assert (put["method"], put["keys"], put["bytes"]) == ("Put", 1, len(block))
    assert (opened["method"], opened["keys"], opened["bytes"]) == ("OpenPipe", 0, 0)
    assert (get["method"], get["keys"], get["bytes"]) == ("GetPiped", 1, len(block))
    assert (get["tenant"], get["token"], get["admin"]) == ("", "1", True)
    assert TOKEN not in log.read_text()


def test_a_refused_get_is_recorded_with_what_it_named(tmp_path: Path) -> None:
    file, log, key = TenantsFile(tmp_path), tmp_path / "audit.jsonl", sample_key(1, OTHER_NAMESPACE)
    file.add("narrow", namespaces=[NAMESPACE.hex()])
    with (
        running_server(tenants_file=file.path, audit_log=log) as server,
        file.client(server.address, "narrow") as client,
        pytest.raises(RpcDenied),
    ):
        list(client.get([key]))
    _, refused, _ = records(log)
    assert (refused["method"], refused["outcome"], refused["keys"]) == ("GetPiped", "PERMISSION_DENIED", 1)
    assert (refused["scope"], refused["key"]) == (OTHER_NAMESPACE.hex()[:16], key.hex()[64:80])


class Kept(NoSink):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def test_refusals_are_bounded_and_the_rest_is_counted() -> None:
    sink, now_s = Kept(), [0.0]
    log = AuditLog(sink, clock=lambda: now_s[0])
    for _ in range(50):
        log.denied("/x/" + "y" * 1000, "ipv4:10.0.0.1:1")
    assert len(sink.records) == 20
    assert len(sink.records[0]["method"]) == 100
    now_s[0] = 1.0
    log.denied("/x/y", "ipv4:10.0.0.1:1")
    log.denied("/x/y", "ipv4:10.0.0.1:1")
    assert [record.get("suppressed") for record in sink.records[-2:]] == [30, None]


def test_what_was_purged_and_what_was_inspected_is_recorded(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with (
        running_server(audit_log=log) as server,
        StoreClient(server.address) as client,
    ):
        key = sample_key(1)
        client.inspect(key)
        client.purge(OTHER_NAMESPACE)
        client.purge(None)
    inspect, one, everything = (
        {name: record[name] for name in ("method", "scope", "keys", "key")} for record in records(log)[1:-1]
    )
    assert inspect == {
        "method": "Inspect",
        "scope": NAMESPACE.hex()[:16],
        "keys": 1,
        "key": key.hex()[64:80],
    }
    assert one == {"method": "Purge", "scope": OTHER_NAMESPACE.hex()[:16], "keys": 0, "key": ""}
    assert everything == one | {"scope": "all"}


def test_nobody_uses_up_the_records_of_others() -> None:
    sink = Kept()
    log = AuditLog(sink, clock=lambda: 0.0)

    def refuse(name: str) -> None:
        identity = Identity(tenant=Tenant(name=name), token_id="1")
        log.call(Call(method="Get", identity=identity, peer="", is_admin=False), "RESOURCE_EXHAUSTED", 0.1)

    for _ in range(50):
        log.denied("/x/y", "ipv4:10.0.0.1:1")
        refuse("busy")
    refuse("quiet")
    callers = Counter(record.get("tenant") for record in sink.records)
    assert callers == {None: 20, "busy": 20, "quiet": 1}


def test_a_log_that_is_rotated_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path, dropped = tmp_path / "audit.jsonl", []
    sink = FileSink(path, lambda: dropped.append(1))
    sink.write({"n": 1})
    wait_until(lambda: len(records(path)) == 1)
    path.rename(tmp_path / "audit.1")
    sink.write({"n": 2})
    sink.write({"n": 3})
    sink.close()
    assert records(tmp_path / "audit.1") == [{"n": 1}]
    assert records(path) == [{"n": 2}, {"n": 3}]
    assert dropped == []


def test_a_log_that_cannot_be_written_loses_records_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, dropped = tmp_path / "logs", []
    directory.mkdir()
    sink = FileSink(directory / "audit.jsonl", lambda: dropped.append(1))
    (directory / "audit.jsonl").unlink()
    directory.rmdir()
    sink.write({"n": 1})
    sink.write({"n": 2})
    wait_until(lambda: len(dropped) == 2)
    directory.mkdir()
    sink.write({"n": 3})
    sink.close()
    assert records(directory / "audit.jsonl") == [{"n": 3}]
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_a_slow_disk_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tq_store.server.audit._MAX_WAITING", 2)
    fifo, dropped = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = FileSink(fifo, lambda: dropped.append(1))
    filler = {"text": "x" * (1 << 20)}
    for _ in range(5):
        sink.write(filler)
    assert dropped
    read = bytearray()

    def drain() -> bool:
        with suppress(BlockingIOError):
            read.extend(os.read(reader, 1 << 20))
        return read.count(b"\n") == 5 - len(dropped)

    wait_until(drain)
    sink.close()
    os.close(reader)


@pytest.mark.parametrize("num_waiting", [1, 3])
def test_a_disk_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_waiting: int
) -> None:
    monkeypatch.setattr("tq_store.server.audit._MAX_WAITING", 2)
    monkeypatch.setattr("tq_store.server.audit._LAST_WRITES_S", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = FileSink(fifo, lambda: None)
    sink.write({"text": "x" * (1 << 20)})  # more than a pipe holds
    wait_until(sink._waiting.empty)
    for _ in range(num_waiting):
        sink.write({"n": 1})
    sink.close()
    assert "its last records are lost" in caplog.text
    sink._waiting.queue.clear()
    sink._waiting.put(None)
    os.set_blocking(reader, True)
    while os.read(reader, 1 << 20)[-1:] != b"\n":
        pass
    sink._thread.join()
    os.close(reader)


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit_log .* cannot be written"):
        FileSink(tmp_path / "absent" / "audit.jsonl", lambda: None)
    with pytest.raises(ConfigError), running_server(audit_log=tmp_path):
        pass
