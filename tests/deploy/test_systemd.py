"""The systemd unit, by systemd's own checks."""

import re
import subprocess
import sys
from pathlib import Path

from deploy.sizing import memory_needed

from tq_store.config import ServerConfig, load_config

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "tq-store.service"
MAX_EXPOSURE = 20  # in tenths of systemd's points; a unit without hardening has 96


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    installed = Path(sys.executable).with_name("tq-store")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/tq-store/bin/tq-store", str(installed))
    assert str(installed) in text
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    unit.write_text(text.replace("DynamicUser=yes", "DynamicUsr=yes"))
    assert re.search("Unknown key (name )?'DynamicUsr'", analyze("verify", "--man=no", unit).stderr)


def test_the_service_is_shut_in() -> None:
    done = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", UNIT)
    assert done.returncode == 0, done.stdout[-200:]
    text = UNIT.read_text(encoding="utf-8")
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "MemoryMax=12G"):
        assert line in text.splitlines()


def test_its_settings_are_settings_of_the_server_and_fit_its_memory() -> None:
    state = {"disk_path": "/var/lib/tq-store/blocks"}
    config = load_config(ServerConfig, arguments=state, file=UNIT.with_name("server.toml"), environment={})
    assert config.tenants_file == Path("/etc/tq-store/tenants.toml")
    assert memory_needed(config) < 11 << 30
