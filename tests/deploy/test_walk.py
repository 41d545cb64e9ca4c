"""The road without Docker in `deploy/README.md`, walked as it is written there."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from store.redis_process import server_binary

ROOT = Path(__file__).parents[2]
PORTS = ("6380", "7437", "7447", "9464", "9465")
TEN_MINUTES_S = 600


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def test_an_operator_gets_from_nothing_to_two_replicas_that_share(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "deploy", checkout / "deploy")
    shutil.copytree(ROOT / "tq_store", checkout / "tq_store", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Without Docker\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    # the machine's own ports and binary, in place of the ones that a reader has
    script = "set -euo pipefail\n" + "echo BLOCK\n".join(blocks) + "kill $(jobs -p)\nwait\n"
    credentials = checkout / "deploy" / "make_credentials.sh"
    texts = [script, credentials.read_text(encoding="utf-8")]
    for port, ours in zip(PORTS, free_ports(len(PORTS)), strict=True):
        texts = [re.sub(rf"\b{port}\b", ours, text) for text in texts]
    script, changed = texts
    credentials.write_text(changed)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(server_binary())
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    started = time.monotonic()
    walk = subprocess.Popen(
        ["bash", "-c", script],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = walk.communicate(timeout=240)
    finally:
        if walk.poll() is None:
            os.killpg(walk.pid, signal.SIGKILL)
    assert walk.returncode in (0, 128 + signal.SIGTERM), output
    assert time.monotonic() - started < TEN_MINUTES_S
    assert re.search(r"64 pages: 0 from the store in [\d.]+ s, 64 made and saved, 0 wrong", output), output
    assert re.search(r"64 pages: 64 from the store in [\d.]+ s, 0 made and saved, 0 wrong", output), output
    assert "hit ratio 100.0%" in output
    assert "the token is missing or wrong" in output
    secrets = checkout / "out" / "secrets"
    logs = [secrets / name for name in ("server-a.log", "server-b.log", "valkey.log")]
    said = output + "".join(log.read_text(encoding="utf-8") for log in logs)
    for name in ("replica-a.token", "operator.token", "valkey_password"):
        assert (secrets / name).read_text(encoding="utf-8").strip() not in said
    made = [secrets, *(path for path in secrets.iterdir() if path not in logs)]
    assert [path for path in made if path.stat().st_mode & 0o077] == []
