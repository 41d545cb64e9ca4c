"""The image and the compose file, by a linter, by Docker's own parser, and by running what they say."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.sizing import memory_needed
from store.redis_process import server_binary, started, stop
from store.running_server import WAIT_S, running_server, wait_until
from store.sample_blocks import keys_of, sample_blocks

from tq_store.client import StoreClient
from tq_store.config import ClientConfig, ServerConfig, load_config

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


def test_what_is_in_the_containers_works_together(composed: dict[str, Any], tmp_path: Path) -> None:
    environment = os.environ | {"TQ_STORE": str(BIN / "tq-store")}
    secrets = tmp_path / "secrets"
    subprocess.run([DEPLOY / "make_credentials.sh", secrets], check=True, env=environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {
        "/run/secrets": str(secrets),
        "valkey:6379": f"127.0.0.1:{port}",
        "tls-port 6379": f"tls-port {port}",
    }
    names |= {"/data": str(tmp_path), "0.0.0.0:7437": "127.0.0.1:0", '"0.0.0.0"': '"127.0.0.1"', "9464": "0"}
    for config in ("server.toml", "valkey.conf"):
        text = Path(composed["configs"][config]["file"]).read_text(encoding="utf-8")
        for theirs, ours in names.items():
            text = text.replace(theirs, ours)
        (tmp_path / config).write_text(text)
    valkey = started([server_binary(), str(tmp_path / "valkey.conf")])
    try:
        check = composed["services"]["valkey"]["healthcheck"]["test"][1].replace("/run/secrets", str(secrets))
        check = check.replace(
            "valkey-cli", f"redis-cli -p {port}" if shutil.which("redis-cli") else f"valkey-cli -p {port}"
        )
        assert subprocess.run(check, shell=True, capture_output=True).returncode == 0
        config = load_config(ServerConfig, arguments={}, file=tmp_path / "server.toml", environment={})
        client_config = load_config(
            ClientConfig, arguments={"address": "127.0.0.1:1"}, file=secrets / "operator.toml", environment={}
        )
        blocks = sample_blocks(3)
        for round_ in ("saves", "loads"):
            fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
            with (
                running_server(**fields) as server,
                StoreClient(server.address, config=client_config) as client,
            ):
                if round_ == "saves":
                    client.put(blocks)
                    wait_until(lambda: client.stats().tiers["redis"].num_blocks == 3)
                assert client.lookup(keys_of(blocks)) == 3
    finally:
        stop(valkey)
    check_again = subprocess.run(check, shell=True, capture_output=True)
    assert check_again.returncode != 0


def test_prometheus_takes_its_configuration(composed: dict[str, Any]) -> None:
    file = composed["configs"]["prometheus.yaml"]["file"]
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parsed = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    assert [job["job_name"] for job in parsed["scrape_configs"]] == ["tq-store"]
    mounted = {config["target"] for config in composed["services"]["prometheus"]["configs"]}
    assert set(parsed["rule_files"]) <= mounted
    source = yaml.safe_load(
        Path(composed["configs"]["grafana-datasource.yaml"]["file"]).read_text(encoding="utf-8")
    )
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_valkey_in_compose_takes_tls_only_and_evicts(composed: dict[str, Any]) -> None:
    text = Path(composed["configs"]["valkey.conf"]["file"]).read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    settings = {line[0]: line[1:] for line in lines if line}
    assert settings["port"] == ["0"]
    assert settings["maxmemory-policy"] == ["allkeys-lfu"]
    mounted = {f"/run/secrets/{secret['source']}" for secret in composed["services"]["valkey"]["secrets"]}
    assert {value[0] for name, value in settings.items() if name.endswith("file")} == mounted
