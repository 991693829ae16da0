from __future__ import annotations

import copy
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.jobs.kuberay import kueue_job, ray_cluster, ray_cron_job, ray_job
from tests.pipeline.jobs.operator import refusals, schema
from tests.pipeline.small import small_config

Manifest = dict[str, Any]
_GPU = {"workers": [2, 5], "cpus_per_worker": 7, "gpus_per_worker": 1}


def _config(**cluster: object) -> Config:
    image = {"image": "registry.example.org/ips:0.1.0", "env": ["AWS_ENDPOINT_URL"]}
    return small_config(cluster=cluster or _GPU, deploy=image, storage={"root": "s3://b/p"})


def _made() -> dict[str, Manifest]:
    makers = {"job": ray_job, "cron": ray_cron_job, "kueue": kueue_job, "cluster": ray_cluster}
    return {name: maker(_config(), ["run", "--config", "demo"])[0] for name, maker in makers.items()}


@pytest.mark.parametrize("name", ["job", "cron", "kueue", "cluster"])
def test_the_operator_takes_it(name: str) -> None:
    manifest = _made()[name]
    jsonschema.validate(manifest, schema(manifest["kind"]))
    assert list(refusals(manifest)) == []


@pytest.mark.parametrize("name", ["job", "cron", "kueue", "cluster"])
def test_kuberay_s_own_schema_knows_every_field(name: str, shared_crds: Path) -> None:
    manifest = _made()[name]
    text = gzip.decompress((shared_crds / f"ray.io_{manifest['kind'].lower()}s.yaml.gz").read_bytes())
    (version,) = [v for v in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if v["name"] == "v1"]
    found = version["schema"]["openAPIV3Schema"]
    _close(found)
    found["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, found)
    manifest["spec"]["concurrencyPolicy"] = "Forbid"
    with pytest.raises(jsonschema.ValidationError, match="concurrencyPolicy"):
        jsonschema.validate(manifest, found)


def _close(node: Any) -> None:
    """What a cluster drops in silence is an error here."""
    if isinstance(node, list):
        for one in node:
            _close(one)
    elif isinstance(node, dict):
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
        if isinstance(node.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in node:
            node.setdefault("additionalProperties", False)
        for one in node.values():
            _close(one)


def _job(change: Callable[[Manifest], object]) -> Manifest:
    manifest = copy.deepcopy(_made()["job"])
    change(manifest["spec"])
    return manifest


def _rule(policy: str, ttl: int, **status: str) -> Manifest:
    return {"policy": policy, "condition": {**status, "ttlSeconds": ttl}}


def _add(spec: Manifest, *rules: Manifest) -> None:
    spec["deletionStrategy"]["deletionRules"] += rules


REFUSED: list[tuple[str, Callable[[Manifest], object]]] = [
    ("DeleteWorkers with autoscaling", lambda s: _add(s, _rule("DeleteWorkers", 1, jobStatus="FAILED"))),
    ("the same rule twice", lambda s: _add(s, _rule("DeleteCluster", 60, jobStatus="FAILED"))),
    ("times that decrease", lambda s: _add(s, _rule("DeleteSelf", 3, jobStatus="FAILED"))),
    ("not exactly one status", lambda s: _add(s, _rule("DeleteSelf", 3))),
    (
        "not exactly one status",
        lambda s: _add(s, _rule("DeleteSelf", 9999, jobStatus="FAILED", jobDeploymentStatus="Failed")),
    ),
    ("rules with shutdown", lambda s: s.update(shutdownAfterJobFinishes=True)),
    ("rules with onSuccess", lambda s: s["deletionStrategy"].update(onSuccess={"policy": "DeleteCluster"})),
    ("delete of a selected cluster", lambda s: s.update(clusterSelector={"a": "b"})),
    ("backoffLimit with clusterSelector", lambda s: s.update(clusterSelector={"a": "b"})),
    ("suspend with clusterSelector", lambda s: s.update(clusterSelector={"a": "b"}, suspend=True)),
    ("SidecarMode with clusterSelector", lambda s: s.update(clusterSelector={"a": "b"}, submissionMode="SidecarMode")),
    ("SidecarMode with submitter", lambda s: s.update(submissionMode="SidecarMode")),
    (
        "SidecarMode without restartPolicy Never",
        lambda s: (
            s.update(submissionMode="SidecarMode"),
            s["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"),
        ),
    ),
    ("backoffLimit in InteractiveMode", lambda s: s.update(submissionMode="InteractiveMode")),
    ("suspend without shutdown", lambda s: s.update(suspend=True)),
    ("ttl without shutdown", lambda s: s.update(ttlSecondsAfterFinished=60)),
    (
        "no min and max without autoscaling",
        lambda s: (
            s["rayClusterSpec"].update(enableInTreeAutoscaling=False),
            s["rayClusterSpec"]["workerGroupSpecs"][0].pop("minReplicas"),
        ),
    ),
    ("min above max", lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=9)),
]


@pytest.mark.parametrize(("reason", "change"), REFUSED, ids=[f"{n}-{reason}" for n, (reason, _) in enumerate(REFUSED)])
def test_what_the_operator_refuses_is_seen(reason: str, change: Callable[[Manifest], object]) -> None:
    assert reason in list(refusals(_job(change)))


def test_an_unknown_field_is_seen() -> None:
    with pytest.raises(jsonschema.ValidationError, match="concurrencyPolicy"):
        jsonschema.validate(_job(lambda s: s.update(concurrencyPolicy="Forbid")), schema("RayJob"))


def test_every_end_of_a_job_that_a_rule_can_name_takes_its_cluster_down() -> None:
    rules = _made()["job"]["spec"]["deletionStrategy"]["deletionRules"]
    found = {
        next(v for k, v in r["condition"].items() if k != "ttlSeconds"): r["condition"]["ttlSeconds"] for r in rules
    }
    assert found == {"SUCCEEDED": 60, "FAILED": 3600, "Failed": 3600}


def test_workers_and_gpus_are_those_of_the_config() -> None:
    groups = {g["groupName"]: g for g in _made()["cluster"]["spec"]["workerGroupSpecs"]}
    train, tile = groups["train"], groups["tile"]
    assert [train[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 5]
    (work,) = train["template"]["spec"]["containers"]
    assert work["resources"]["requests"] == {"cpu": "7", "memory": "16384Mi", "nvidia.com/gpu": "1"}
    assert work["resources"]["limits"] == {"memory": "16384Mi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in tile["template"]["spec"]["containers"][0]["resources"]["limits"]
    fixed = _made()["kueue"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [fixed[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    cpu_only = ray_cluster(_config(workers=3), [])[0]["spec"]["workerGroupSpecs"]
    assert [(g["groupName"], g["maxReplicas"]) for g in cpu_only] == [("train", 3)]


def test_kueue_admits_it_by_its_label_and_no_rule_stands_in_the_way() -> None:
    manifest = _made()["kueue"]
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ips"
    assert manifest["spec"]["suspend"] is True
    assert "deletionStrategy" not in manifest["spec"]


def test_a_name_that_a_kind_cannot_have_is_refused() -> None:
    config = _config().model_copy(update={"name": "x" * 37})
    assert ray_job(config, [])[0]["metadata"]["name"] == "x" * 37
    with pytest.raises(ConfigError, match="37 characters, and 36 are allowed"):
        ray_cron_job(config, [])
