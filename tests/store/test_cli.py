import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store.running_server import running_server, write_token
from store.sample_blocks import NAMESPACE, sample_block, sample_blocks, sample_key
from store.tenants_file import TenantsFile

from tq_store import cli, commands
from tq_store.client import StoreClient
from tq_store.config import ClientConfig, ServerConfig
from tq_store.settings import settings

COMMANDS = ["serve", "ping", "stats", "inspect", "purge"]


@pytest.fixture
def address() -> Iterator[str]:
    with running_server() as server, StoreClient(server.address) as client:
        client.put(sample_blocks(3))
        yield server.address


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_ping_tells_time_and_version(capsys: pytest.CaptureFixture[str], address: str) -> None:
    code, out, err = run(capsys, "ping", "--address", address)
    assert (code, err) == (0, "")
    version = importlib.metadata.version("tq-store")
    assert out.startswith(f"tq-store {version} at {address} answers in ")
    assert out.endswith(" ms with connecting)\n")


def test_stats_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str], address: str) -> None:
    code, out, _ = run(capsys, "stats", "--address", address)
    assert code == 0
    assert ["memory", "3", "1.5", "KiB", "1", "GiB", "0"] in [line.split() for line in out.splitlines()]
    code, out, _ = run(capsys, "stats", "--json", "--address", address)
    assert code == 0
    assert json.loads(out)["tiers"]["memory"] == {
        "num_blocks": 3,
        "used_bytes": 1536,
        "budget_bytes": 1 << 30,
        "evicted_blocks": 0,
        "namespaces": {NAMESPACE.hex(): {"num_blocks": 3, "used_bytes": 1536}},
    }


def test_inspect_asks_the_server_for_a_key(capsys: pytest.CaptureFixture[str], address: str) -> None:
    code, out, _ = run(capsys, "inspect", sample_key(1).hex(), "--address", address)
    assert code == 0
    assert out.startswith("memory: here, 512 bytes, sound\nnamespace ")
    code, out, _ = run(capsys, "inspect", sample_key(9).hex(), "--address", address)
    assert (code, out) == (1, "memory: not here\n")


def test_inspect_reads_a_file_without_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "block"
    data = sample_block(1)[1]
    file.write_bytes(data)
    code, out, _ = run(capsys, "inspect", str(file))
    assert code == 0
    assert out.startswith("a sound block\nnamespace ")
    file.write_bytes(data[:-1])
    code, out, _ = run(capsys, "inspect", str(file))
    assert code == 1
    assert out.startswith("not a sound block: the length check failed: payload has 255 bytes")


def test_inspect_reads_no_more_of_a_file_than_a_block_can_have(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MAX_BLOCK_BYTES", 511)
    (tmp_path / "block").write_bytes(sample_block(1)[1] + bytes(1 << 20))
    code, out, _ = run(capsys, "inspect", str(tmp_path / "block"))
    assert (code, out[:14]) == (0, "a sound block\n")


@pytest.mark.parametrize("target", ["ab", "no/such/file", "0" * 127, "."])
def test_inspect_explains_what_it_wants(capsys: pytest.CaptureFixture[str], target: str) -> None:
    code, out, err = run(capsys, "inspect", target)
    assert (code, out) == (2, "")
    assert f"'{target}' is neither a block key of 128 hex digits nor a file that can be read" in err


def test_purge_removes_what_it_is_told(capsys: pytest.CaptureFixture[str], address: str) -> None:
    code, out, err = run(capsys, "purge", "--all", "--address", address)
    assert (code, out) == (2, "")
    assert err == "tq-store: this removes every block; say --yes if that is meant\n"
    code, _, err = run(capsys, "purge", "--namespace", NAMESPACE.hex(), "--address", address)
    assert code == 2
    assert f"every block of namespace {NAMESPACE.hex()};" in err
    assert run(capsys, "purge", "--namespace", "00" * 32, "--yes", "--address", address)[:2] == (
        1,
        "removed 0 blocks\n",
    )
    assert run(capsys, "purge", "--namespace", NAMESPACE.hex(), "--yes", "--address", address)[:2] == (
        0,
        "removed 3 blocks\n",
    )
    with StoreClient(address) as client:
        client.put(sample_blocks(2))
    assert run(capsys, "purge", "--all", "--yes", "--address", address)[:2] == (0, "removed 2 blocks\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["flush"],
        ["purge", "--yes"],
        ["purge", "--all", "--namespace", "00" * 32],
        ["purge", "--namespace", "00"],
        ["purge", "--namespace", "zz" * 32],
        ["inspect"],
        ["serve", "--listne", "x"],
    ],
)
def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: tq-store" in capsys.readouterr().err


def test_an_unreachable_server_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "ping", "--address", "127.0.0.1:1", "--max-attempts", "1")
    assert (code, out) == (3, "")
    assert err.startswith("tq-store: Ping at 127.0.0.1:1: ")
    assert err.endswith("; is a server running there, and is --address right?\n")
    assert err.count("\n") == 1


def test_a_server_that_turns_us_away_ends_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with running_server(token_file=write_token(tmp_path)) as server:
        code, _, err = run(capsys, "stats", "--address", server.address)
        assert code == 2
        assert "the token is missing or wrong" in err
        with_token = ("--token-file", str(tmp_path / "token"))
        assert run(capsys, "stats", "--address", server.address, *with_token)[0] == 0


def test_another_failure_of_a_call_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(max_concurrent_calls=1) as server, StoreClient(server.address) as client:
        blocks = iter([sample_block(1), sample_block(2)])

        def source() -> Iterator[tuple[bytes, bytes]]:
            yield next(blocks)
            assert run(capsys, "ping", "--address", server.address)[0] == 1
            yield next(blocks)

        assert len(client.put(source())) == 2


def test_settings_come_from_file_and_environment_too(
    capsys: pytest.CaptureFixture[str], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tq-store.toml"
    file.write_text(f"[client]\naddress = '{address}'\n")
    assert run(capsys, "ping", "--config", str(file))[0] == 0
    monkeypatch.setenv("TQ_STORE_ADDRESS", address)
    assert run(capsys, "ping")[0] == 0
    monkeypatch.setenv("TQ_STORE_ADRESS", address)
    code, _, err = run(capsys, "ping")
    assert code == 2
    assert "did you mean 'TQ_STORE_ADDRESS'?" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"  tq-store {command}" in text
    for setting in settings(ServerConfig if command == "serve" else ClientConfig).values():
        assert setting.flag in text


def test_a_switch_needs_no_value(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert run(capsys, "ping", "--tls", "--address", address, "--max-attempts", "1")[0] == 3


class Terminal(io.StringIO):
    """Ends this process the usual way as soon as it reads that the server is ready."""

    def write(self, text: str) -> int:
        if "serves on" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_serve_runs_until_it_is_told_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for options, ending in (([], "\n"), (["--metrics-port", "0"], "/metrics\n")):
        monkeypatch.setattr(sys, "stdout", Terminal())
        try:
            assert cli.main(["serve", "--listen", "127.0.0.1:0", *options]) == 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        text = sys.stdout.getvalue()
        assert text.startswith("tq-store serves on 127.0.0.1:")
        assert text.endswith(ending)
        assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--listen", "0.0.0.0:7437"], 2, "add --tls-cert and --tls-key and --token-file"),
        (["--memory-budget", "lots"], 2, "memory_budget (arguments): 'lots' is not understood"),
        (["--disk-path", "/dev/null/x", "--disk-budget", "1MiB"], 3, "/dev/null/x"),
        (["--redis-url", "redis://:secret@127.0.0.1:1", "--listen", "127.0.0.1:0"], 3, "127.0.0.1:1"),
        (["--redis-url", "http://:secret@x"], 2, "redis"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str
) -> None:
    given, out, err = run(capsys, "serve", *arguments)
    assert (given, out) == (code, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert "secret" not in err


def test_without_the_server_extra_serve_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tq_store.server.app", None)
    code, _, err = run(capsys, "serve")
    assert code == 2
    assert "pip install 'tq-store[server]'" in err


def test_the_client_commands_need_no_server_packages() -> None:
    script = """
import sys
for name in ("prometheus_client", "redis", "grpc_health", "grpc_reflection"):
    sys.modules[name] = None
from tq_store.cli import main
sys.exit(main(["ping", "--address", "127.0.0.1:1", "--max-attempts", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 3


def test_the_installed_command_is_this_one() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="tq-store")
    assert command.load() is cli.main


def test_a_new_token_is_shown_once_and_its_entry_lets_it_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, token, hint = run(capsys, "token", "new", "search")
    assert code == 0
    assert "among the tokens of [search]" in hint
    assert token.strip() not in hint
    entry = hint.rpartition(': "')[2].rstrip('"\n')
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[search]\ntokens = ["{entry}"]\nadmin = true\n[idle]\n')
    tenants.chmod(0o600)
    code, out, _ = run(capsys, "token", "check", str(tenants))
    assert (code, out) == (0, f"search: {entry.partition(':')[0]}\nidle: no token\n")
    with running_server(tenants_file=tenants) as server:
        shown = ["--address", server.address, "--token-file", str(write_token(tmp_path, token.strip()))]
        assert run(capsys, "stats", *shown)[0] == 0
    tenants.write_text("[search]\ntokens = 1")
    assert run(capsys, "token", "check", str(tenants))[0] == 2


def test_a_hangup_reads_the_tokens_again_and_ends_nothing(tmp_path: Path) -> None:
    tenants = TenantsFile(tmp_path)
    tenants.add("search")
    command = [sys.executable, "-m", "tq_store", "serve", "--listen", f"unix:{tmp_path}/socket"]
    server = subprocess.Popen(
        [*command, "--tenants-file", str(tenants.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        assert "serves on" in server.stdout.readline()
        server.send_signal(signal.SIGHUP)
        assert "tokens were read again" in server.stderr.readline()
        with tenants.client(f"unix:{tmp_path}/socket", "search") as client:
            assert client.ping().version
    finally:
        server.terminate()
        server.communicate(timeout=20)
    assert server.returncode == 0


def test_a_command_whose_package_is_absent_is_left_out(monkeypatch, capsys):
    """As in a server's image, which has no connectors."""

    class Absent:
        name = "calibrate"

        def load(self):
            raise ModuleNotFoundError("No module named 'tq_connectors'")

    monkeypatch.setattr("tq_store.cli.entry_points", lambda group: [Absent()])
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "serve" in shown
    assert "calibrate" not in shown
