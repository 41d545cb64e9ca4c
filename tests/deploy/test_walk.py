"""The road without Docker in `deploy/README.md`, then the drills of the runbook, as they are written."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from store.redis_process import server_binary

ROOT = Path(__file__).parents[2]
PORTS = ("6380", "7437", "7447", "7457", "9464", "9465")
TEN_MINUTES_S = 600


def section(document: str, heading: str) -> str:
    text = (ROOT / "deploy" / document).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def commands(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def promised(text: str) -> list[str]:
    """Lines of output that the document shows."""
    return re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ (m?s)\b", r"… \1", text)


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.timeout(TEN_MINUTES_S + 60)
def test_an_operator_gets_from_nothing_to_two_replicas_that_share(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "deploy", checkout / "deploy")
    # of the rest of the project as much as goes into the image, so that this also shows that it is enough
    shutil.copytree(ROOT / "tq_store", checkout / "tq_store", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    text = section("README.md", "Without Docker") + section("RUNBOOK.md", "Failure drills")
    blocks = commands(text)
    assert len(blocks) == 6 + 5
    # the machine's own ports, in place of those that a reader has
    files = [checkout / "deploy" / "make_credentials.sh", checkout / "walk.sh"]
    files[1].write_text("set -euo pipefail\n" + "".join(blocks))
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    for file in files:
        written = file.read_text(encoding="utf-8")
        file.write_text(re.sub("|".join(PORTS), lambda found: ports[found[0]], written))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(server_binary())
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    started = time.monotonic()
    walk = subprocess.Popen(
        ["bash", "walk.sh"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = walk.communicate(timeout=TEN_MINUTES_S)
    finally:
        os.killpg(walk.pid, signal.SIGKILL)
    assert walk.returncode == 0, output
    assert time.monotonic() - started < TEN_MINUTES_S
    for port, ours in ports.items():
        output = output.replace(ours, port)
    rest = without_times(output)
    for line in promised(text):
        _, found, rest = rest.partition(without_times(line))
        assert found, f"{line!r} is missing or too early in:\n{output}"
    (packages,) = (checkout / "out" / "venv" / "lib").glob("python*/site-packages")
    installed = {path.name for path in packages.iterdir()}
    assert {"tq_store", "grpc", "redis"} <= installed
    assert not installed & {"torch", "triton", "numpy", "tq_kernels", "tq_connectors"}
    secrets = checkout / "out" / "secrets"
    logs = [secrets / name for name in ("server-a.log", "server-b.log", "server-c.log", "valkey.log")]
    said = output + "".join(log.read_text(encoding="utf-8") for log in logs)
    for name in ("replica-a.token", "operator.token", "valkey_password"):
        assert (secrets / name).read_text(encoding="utf-8").strip() not in said
    made = [secrets, *(path for path in secrets.iterdir() if path.is_file() and path not in logs)]
    assert [path for path in made if path.stat().st_mode & 0o077] == []
