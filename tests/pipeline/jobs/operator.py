"""What KubeRay 1.7 takes: the fields of its kinds, and the combinations that its operator refuses.

The fields are those of its API types; the schemas of a cluster drop others in silence. The refusals are those of its
webhook and controller, which no schema holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_TEXT, _NUMBER, _YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_ANY: Schema = {}


def _object(required: str = "", **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


_ENV = _list(_object("name", name=_TEXT, value=_TEXT, valueFrom=_ANY))
_PROBE = _object(
    httpGet=_object("port", path=_TEXT, port=_ANY),
    tcpSocket=_object("port", port=_ANY),
    exec=_object(command=_list(_TEXT)),
    periodSeconds=_NUMBER,
    initialDelaySeconds=_NUMBER,
)
_CONTAINER = _object(
    "name image resources securityContext",
    name=_TEXT,
    image=_TEXT,
    command=_list(_TEXT),
    workingDir=_TEXT,
    env=_ENV,
    envFrom=_list(_object(secretRef=_object("name", name=_TEXT))),
    ports=_list(_object("containerPort", name=_TEXT, containerPort=_NUMBER)),
    volumeMounts=_list(_object("name mountPath", name=_TEXT, mountPath=_TEXT)),
    readinessProbe=_PROBE,
    livenessProbe=_PROBE,
    resources=_object(requests=_map(_TEXT), limits=_map(_TEXT)),
    securityContext=_object(allowPrivilegeEscalation=_YES, capabilities=_object(drop=_list(_TEXT))),
)
_VOLUME = _object("name emptyDir", name=_TEXT, emptyDir=_object(medium=_TEXT, sizeLimit=_TEXT))
POD = _object(
    "containers",
    serviceAccountName=_TEXT,
    automountServiceAccountToken=_YES,
    securityContext=_object(
        runAsNonRoot=_YES, runAsUser=_NUMBER, fsGroup=_NUMBER, seccompProfile=_object("type", type=_TEXT)
    ),
    volumes=_list(_VOLUME),
    restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
    terminationGracePeriodSeconds=_NUMBER,
    tolerations=_list(_object(key=_TEXT, operator=_TEXT, effect=_TEXT)),
    containers=_list(_CONTAINER),
)
_TEMPLATE = _object("spec", metadata=_object(labels=_map(_TEXT)), spec=POD)
_CLUSTER = _object(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=_TEXT,
    authOptions=_object("mode", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=_YES,
    autoscalerOptions=_ANY,
    headGroupSpec=_object("template", rayStartParams=_map(_TEXT), serviceType=_TEXT, template=_TEMPLATE),
    workerGroupSpecs=_list(
        _object(
            "groupName template",
            groupName=_TEXT,
            replicas=_NUMBER,
            minReplicas=_NUMBER,
            maxReplicas=_NUMBER,
            numOfHosts=_NUMBER,
            rayStartParams=_map(_TEXT),
            template=_TEMPLATE,
        )
    ),
)
_RULE = _object(
    "policy condition",
    policy={"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]},
    condition=_object(
        jobStatus={"enum": ["SUCCEEDED", "FAILED"]},
        jobDeploymentStatus={"enum": ["Failed"]},
        ttlSeconds={"type": "integer", "minimum": 0},
    ),
)
JOB = _object(
    "entrypoint",
    **dict.fromkeys(["entrypoint", "runtimeEnvYAML", "jobId", "entrypointResources", "managedBy"], _TEXT),
    **dict.fromkeys(["activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"], _NUMBER),
    **dict.fromkeys(["shutdownAfterJobFinishes", "suspend"], _YES),
    **dict.fromkeys(
        ["submitterPodTemplate", "metadata", "clusterSelector", "entrypointNumCpus", "entrypointNumGpus"], _ANY
    ),
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=_object(backoffLimit=_NUMBER),
    deletionStrategy=_object(onSuccess=_ANY, onFailure=_ANY, deletionRules=_list(_RULE)),
    rayClusterSpec=_CLUSTER,
)
_CRON = _object("jobTemplate schedule", jobTemplate=JOB, schedule=_TEXT, timeZone=_TEXT, suspend=_YES)


def schema(kind: str) -> Schema:
    """Of a whole object of KubeRay's."""
    spec = {"RayJob": JOB, "RayCronJob": _CRON, "RayCluster": _CLUSTER}[kind]
    meta = _object("name namespace", name=_TEXT, namespace=_TEXT, labels=_map(_TEXT))
    version = {"const": "ray.io/v1"}
    return _object("apiVersion kind metadata spec", apiVersion=version, kind={"const": kind}, metadata=meta, spec=spec)


def refusals(manifest: dict[str, Any]) -> Iterator[str]:
    """Why the operator would refuse an object that its schema allows."""
    spec, kind, name = manifest["spec"], manifest["kind"], manifest["metadata"]["name"]
    longest = {"RayJob": 47, "RayCronJob": 36, "RayCluster": 47}[kind]
    if len(name) > longest:
        yield f"name longer than {longest}"
    if kind == "RayCronJob":
        if "TZ" in spec["schedule"]:
            yield "TZ in schedule"
        spec = spec["jobTemplate"]
    yield from _of_cluster(spec if kind == "RayCluster" else spec.get("rayClusterSpec", {}))
    if kind != "RayCluster":
        yield from _of_job(spec)


def _of_cluster(spec: dict[str, Any]) -> Iterator[str]:
    for group in spec.get("workerGroupSpecs", ()):
        if not spec.get("enableInTreeAutoscaling") and not {"minReplicas", "maxReplicas"} <= set(group):
            yield "no min and max without autoscaling"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            yield "min above max"


def _of_job(spec: dict[str, Any]) -> Iterator[str]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), "clusterSelector" in spec
    head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
    facts = {
        "backoffLimit with clusterSelector": selector and spec.get("backoffLimit", 0) > 0,
        "suspend with clusterSelector": selector and spec.get("suspend", False),
        "SidecarMode with clusterSelector": selector and mode == "SidecarMode",
        "SidecarMode with submitter": mode == "SidecarMode"
        and bool({"submitterPodTemplate", "submitterConfig"} & {*spec}),
        "SidecarMode without restartPolicy Never": mode == "SidecarMode"
        and head.get("restartPolicy", "Never") != "Never",
        "backoffLimit in InteractiveMode": mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0,
        "suspend without shutdown": spec.get("suspend", False) and not spec.get("shutdownAfterJobFinishes", False),
        "ttl without shutdown": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not spec.get("shutdownAfterJobFinishes", False),
    }
    yield from (fact for fact, holds in facts.items() if holds)
    if "deletionStrategy" in spec:
        yield from _of_rules(spec, selector=selector)


def _of_rules(spec: dict[str, Any], *, selector: bool) -> Iterator[str]:
    strategy = spec["deletionStrategy"]
    rules = strategy.get("deletionRules", [])
    if spec.get("shutdownAfterJobFinishes"):
        yield "rules with shutdown"
    if {"onSuccess", "onFailure"} & set(strategy) and rules:
        yield "rules with onSuccess"
    policies = {rule["policy"] for rule in rules}
    if selector and policies & {"DeleteCluster", "DeleteWorkers"}:
        yield "delete of a selected cluster"
    if "DeleteWorkers" in policies and spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        yield "DeleteWorkers with autoscaling"
    seen: dict[tuple[str, str], int] = {}
    for rule in rules:
        condition = rule["condition"]
        if len({"jobStatus", "jobDeploymentStatus"} & set(condition)) != 1:
            yield "not exactly one status"
        status = condition.get("jobStatus") or condition.get("jobDeploymentStatus")
        if (rule["policy"], status) in seen:
            yield "the same rule twice"
        seen[rule["policy"], status] = condition["ttlSeconds"]
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    for status in {status for _, status in seen}:
        times = [seen[policy, status] for policy in order if (policy, status) in seen]
        if times != sorted(times):
            yield "times that decrease"
