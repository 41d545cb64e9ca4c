"""The image and the compose file, by a linter, by Docker's own parser, and by running what they say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy.sizing import memory_needed
from store.running_server import WAIT_S, running_server

from tq_store.config import ServerConfig, load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^\s*{name} +(.*)$", DOCKERFILE, flags=re.MULTILINE)


def test_the_linter_of_dockerfiles_is_content() -> None:
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_not_root_and_is_made_in_two_stages() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last_stage, flags=re.MULTILINE)
    assert len(instructions("FROM")) == 2
    assert "apt-get" not in DOCKERFILE


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {
        name for line in instructions("COPY") for name in line.split()[:-1] if not line.startswith("--")
    }
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in copied)


def test_the_health_check_of_the_image_tells_a_ready_server_from_none() -> None:
    (check,) = re.findall(r"HEALTHCHECK.*?CMD (\[.*\])", DOCKERFILE)
    command: list[str] = json.loads(check)
    with running_server(metrics_port=0) as server:
        assert server.metrics_url is not None
        port = server.metrics_url.split(":")[2].split("/")[0]
        ours = [part.replace("9464", port) for part in [sys.executable, *command[1:]]]
        assert subprocess.run(ours, timeout=WAIT_S).returncode == 0
    assert subprocess.run(ours, timeout=WAIT_S, stderr=subprocess.DEVNULL).returncode == 1


def compose(**environment: str) -> subprocess.CompletedProcess[str]:
    """The compose file as Docker's parser understands it, with its variables filled in."""
    command = [BIN / "docker-compose", "--file", DEPLOY / "compose.yaml", "config", "--format", "json"]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]} | environment
    )


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    done = compose(TQ_STORE_SECRETS="/secrets", TQ_STORE_USER="1000:1000")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_compose_starts_nothing_without_secrets() -> None:
    done = compose()
    assert done.returncode != 0
    assert "required variable TQ_STORE_SECRETS is missing" in done.stderr


def test_every_container_is_bounded_and_unprivileged(composed: dict[str, Any]) -> None:
    assert set(composed["services"]) == {"tq-store", "valkey", "prometheus", "grafana"}
    for name, service in composed["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) > 0, name
        assert service["restart"] == "unless-stopped", name
        assert ":" in service["image"] or name == "tq-store", f"{name} floats"
        for port in service.get("ports", []):
            assert port.get("host_ip") == "127.0.0.1" or (name, port["target"]) == ("tq-store", 7437)
    assert composed["networks"]["cache"]["internal"] is True
    assert list(composed["services"]["valkey"]["networks"]) == ["cache"]
    for config in composed["configs"].values():
        assert Path(config["file"]).is_file()
    assert all(secret["file"].startswith("/secrets/") for secret in composed["secrets"].values())


def test_the_settings_in_compose_are_settings_of_the_server(composed: dict[str, Any]) -> None:
    file = Path(composed["configs"]["server.toml"]["file"])
    config = load_config(ServerConfig, arguments={}, file=file, environment={})
    service = composed["services"]["tq-store"]
    mounted = {f"/run/secrets/{secret['source']}" for secret in service["secrets"]}
    named = set(re.findall(r'"(/run/secrets/[^"]+)"', file.read_text(encoding="utf-8")))
    assert named == mounted
    assert config.metrics_port == 9464
    assert config.redis_url == "rediss://valkey:6379"
    assert int(service["mem_limit"]) >= memory_needed(config)


def test_valkey_in_compose_takes_tls_only_and_evicts(composed: dict[str, Any]) -> None:
    text = Path(composed["configs"]["valkey.conf"]["file"]).read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    settings = {line[0]: line[1:] for line in lines if line}
    assert settings["port"] == ["0"]
    assert settings["maxmemory-policy"] == ["allkeys-lfu"]
    mounted = {f"/run/secrets/{secret['source']}" for secret in composed["services"]["valkey"]["secrets"]}
    assert {value[0] for name, value in settings.items() if name.endswith("file")} == mounted
