from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from pipeline.config.recipe import Config
from pipeline.jobs.services import cron_job, mlflow, mlflow_command, namespace, s3, s3_command
from tests.pipeline.jobs.operator import POD
from tests.pipeline.small import small_config


def _config(**deploy: object) -> Config:
    return small_config(
        name="My_Study",
        deploy={"image": "registry.example.org/ips:0.1.0", **deploy},
        cluster={"workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 1},
    )


def _pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    found: dict[str, Any] = spec["template"]["spec"]
    return found


def test_a_cron_job_is_never_two_at_once_and_ends_what_cannot_be_mended() -> None:
    (manifest,) = cron_job(_config(schedule="7 3 * * *", time_zone="Europe/Berlin"), ["run", "--config", "demo"])
    spec = manifest["spec"]
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 3600)
    assert (spec["schedule"], spec["timeZone"]) == ("7 3 * * *", "Europe/Berlin")
    assert manifest["metadata"]["name"] == "my-study"
    job = spec["jobTemplate"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "ips", "operator": "In", "values": [2, 3, 4, 5, 6]}
    assert _pod(manifest)["restartPolicy"] == "Never"  # without which Kubernetes refuses the policy
    (work,) = _pod(manifest)["containers"]
    assert work["command"] == ["python", "-m", "pipeline", "run", "--config", "demo"]
    assert work["resources"]["requests"] == {"cpu": "6", "memory": "32768Mi", "nvidia.com/gpu": "2"}


def test_with_a_cluster_s_address_it_only_submits() -> None:
    (manifest,) = cron_job(_config(address="http://head:8265"), ["run"])
    (work,) = _pod(manifest)["containers"]
    assert work["command"] == ["python", "-m", "pipeline", "submit", "--working-dir", "/opt/ips", "--detach", "run"]
    assert work["resources"]["limits"] == {"memory": "2048Mi"}
    token = {one["name"]: one for one in work["env"]}["RAY_AUTH_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "my-study", "key": "auth_token"}


@pytest.mark.parametrize("maker", [cron_job, mlflow, s3])
def test_pods_have_no_field_that_is_unknown_and_no_rights(maker: Any) -> None:
    pods = [_pod(one) for one in maker(_config(), ["run"]) if one["kind"] in ("CronJob", "Deployment", "StatefulSet")]
    assert pods
    for spec in pods:
        jsonschema.validate(spec, POD)
        assert spec["securityContext"]["runAsNonRoot"] is True
        for one in spec["containers"]:
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ":" in one["image"]  # with a version
            assert {"secretRef": {"name": "ips-credentials"}} in one["envFrom"]


def test_the_server_answers_by_the_names_of_its_service_and_holds_no_password() -> None:
    command = " ".join(_pod(mlflow(_config(), [])[2])["containers"][0]["command"])
    hosts = command.partition("--allowed-hosts ")[2].split(",")
    assert {"mlflow", "mlflow:5000", "mlflow.ips", "mlflow.ips.svc", "mlflow.ips.svc:5000", "localhost:5000"} <= set(
        hosts
    )
    assert "postgresql+psycopg2://mlflow@postgres:5432/mlflow" in command
    assert mlflow_command("db", "x")[:2] == ["mlflow", "server"]
    assert "$AWS_SECRET_ACCESS_KEY" in s3_command("/data")[2]


def test_only_the_namespace_reaches_its_ports() -> None:
    made = {one["kind"]: one for one in namespace(_config(namespace="study"), [])}
    assert made["Namespace"]["metadata"]["name"] == "study"
    assert made["ServiceAccount"]["automountServiceAccountToken"] is False
    assert made["NetworkPolicy"]["spec"]["ingress"] == [{"from": [{"podSelector": {}}]}]
    assert made["NetworkPolicy"]["metadata"]["namespace"] == "study"


def test_a_volume_s_class_is_the_cluster_s_unless_named() -> None:
    (claim,) = s3(_config(), [])[0]["spec"]["volumeClaimTemplates"]
    assert "storageClassName" not in claim["spec"]
    (claim,) = s3(_config(storage_class="fast"), [])[0]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"


@pytest.mark.parametrize("maker", [cron_job, mlflow, s3, namespace])
def test_kubernetes_knows_every_field(maker: Any) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in maker(_config(), ["run"]):
        validate.validate(manifest, validate.latest_version(), strict=True)
