"""The Helm chart, rendered by Helm's own engine, against the schemas of Kubernetes."""

import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from deploy.sizing import memory_needed

from tq_store.config import ServerConfig, load_config

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "tq-store"
SECRETS: dict[str, Any] = {"tls": {"secret": "cert"}, "tenants": {"secret": "tenants"}}
EVERYTHING: dict[str, Any] = {
    "tls": {"secret": "cert", "clientCaSecret": "clients"},
    "tenants": {"secret": "tenants"},
    "redis": {
        "url": "rediss+cluster://a,b",
        "user": "tq-store",
        "passwordSecret": "password",
        "caSecret": "ca",
    },
    "disk": {"enabled": True, "storageClass": "fast"},
    "metrics": {"serviceMonitor": True, "prometheusRule": True, "labels": {"release": "monitor"}},
    "settings": {"max_inflight": "512MiB", "redis_ttl": "24h", "max_concurrent_calls": 64},
    "image": {"repository": "registry.example/tq-store", "tag": "7", "pullSecrets": [{"name": "pull"}]},
    "priorityClassName": "high",
    "nodeSelector": {"pool": "cache"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"podAffinity": {}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "inference"},
    "service": {"annotations": {"c": "d"}},
    "serviceAccount": {"annotations": {"e": "f"}},
}
SETTINGS_OF_VALUES = [SECRETS, EVERYTHING, {**SECRETS, "tenants": {"inline": "[replicas]\ntokens = []\n"}}]
OURS = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which the schemas of Kubernetes do not know."""


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="cache", namespace="prod")
    documents = [yaml.safe_load_all(text) for name, text in files.items() if not name.endswith(".txt")]
    return [document for several in documents for document in several if document]


def one(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    (found,) = (document for document in render(values) if document["kind"] == kind)
    return found


@pytest.mark.parametrize("values", SETTINGS_OF_VALUES, ids=["least", "everything", "inline"])
def test_helm_and_the_schemas_of_kubernetes_are_content(values: dict[str, Any]) -> None:
    findings = helm_python.lint(CHART, values, strict=True)
    assert findings["errors"] == []
    assert [note["error"] for note in findings["messages"]] == ["icon is recommended"]
    documents = render(values)
    for document in documents:
        if document["kind"] not in OURS:
            for version in ("1.28.0", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(document, version, strict=True)
    kinds = {document["kind"] for document in documents}
    assert kinds >= {
        "StatefulSet",
        "Service",
        "ConfigMap",
        "ServiceAccount",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }
    assert (kinds >= OURS) == (values is EVERYTHING)
    assert ("Secret" in kinds) == ("inline" in values["tenants"])


@pytest.mark.parametrize("values", SETTINGS_OF_VALUES, ids=["least", "everything", "inline"])
def test_the_settings_are_settings_of_the_server_and_each_file_is_mounted(
    values: dict[str, Any], tmp_path: Path
) -> None:
    text = one("ConfigMap", values)["data"]["server.toml"]
    (tmp_path / "server.toml").write_text(text)
    config = load_config(ServerConfig, arguments={}, file=tmp_path / "server.toml", environment={})
    assert config.memory_budget_bytes == 8 << 30
    pod = one("StatefulSet", values)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in re.findall(r'"(/[^"]+)"', text):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path
    room = {"Gi": 1 << 30}[container["resources"]["limits"]["memory"][-2:]]
    room *= int(container["resources"]["limits"]["memory"][:-2])
    assert room >= memory_needed(config)


def test_a_server_runs_unprivileged_and_is_probed_where_it_answers() -> None:
    pod = one("StatefulSet", SECRETS)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert pod["terminationGracePeriodSeconds"] > 20
    for volume in pod["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440


def test_strangers_reach_nothing() -> None:
    policy = one("NetworkPolicy", SECRETS)["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["grpc", "metrics"]
    assert all(rule["from"] for rule in policy["ingress"])
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53]
    ports = [rule["ports"][0]["port"] for rule in one("NetworkPolicy", EVERYTHING)["spec"]["egress"]]
    assert ports == [53, 6379]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tenants": {"secret": "t"}}, "name a Secret with the certificate"),
        ({"tls": {"secret": "t"}}, "name a Secret with the tenants"),
        ({**SECRETS, "replica": 3}, "additional properties 'replica' not allowed"),
        ({**SECRETS, "redis": {"url": "rediss://user:password@host"}}, "does not match pattern"),
        ({**SECRETS, "memoryBudget": "plenty"}, "does not match pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_a_reason(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm_python.HelmError, match=complaint):
        render(values)


def test_the_alerts_of_the_chart_are_the_alerts() -> None:
    spec = one("PrometheusRule", EVERYTHING)["spec"]
    assert spec == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))


def test_each_value_is_explained_and_the_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == project["version"]
    schema = (CHART / "values.schema.json").read_text(encoding="utf-8")
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert all(f'"{name}"' in schema for name in values)
