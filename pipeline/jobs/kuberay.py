"""Manifests of KubeRay, as its operator of version 1.7 takes them, and of Kueue beside it.

CRDs drop unknown fields in silence, and the operator refuses combinations that their schemas allow; tests hold both. A
job that was *stopped* is cleaned up by no rule: who stops one deletes the RayJob too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from pipeline.config.recipe import Config
from pipeline.jobs.pods import Manifest, label_name, metadata, pod, ray_container

_RAY_JOB_CHARS, _RAY_CRON_JOB_CHARS = 47, 36  # KubeRay appends to names, which may have 63 characters
_DONE_S, _FAILED_S = 60, 3600  # until a cluster is taken down; that of a failed job is left for an hour, to look at
_NEVER_RAN_S = 3600  # shorter than any sensible schedule: ticks whose GPUs never come must not pile up
_RETRIES = 2  # each on a new cluster, so that what is saved lies in the storage alone


def ray_cluster_spec(config: Config, *, autoscaling: bool) -> Manifest:
    """Head, workers that train, and where these have GPUs also workers that tile.

    Without autoscaling there are as many as `cluster.workers` begins with.
    """
    cluster, deploy = config.cluster, config.deploy
    head, volumes = ray_container(config, "ray-head", cpus=deploy.head_cpus, memory_gib=deploy.head_memory_gib)
    most = cluster.most_workers
    groups = [_group(config, "train", cluster.fewest_workers, most, cluster.gpus_per_worker, autoscaling=autoscaling)]
    if cluster.gpus_per_worker:
        groups.append(_group(config, "tile", deploy.tilers, deploy.tilers, 0, autoscaling=autoscaling))
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": autoscaling,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # the driver runs here, and needs none of Ray's CPUs
            "template": {"spec": pod(config, [head], volumes=volumes)},
        },
        "workerGroupSpecs": groups,
    }


def _group(config: Config, name: str, fewest: int, most: int, gpus: float, *, autoscaling: bool) -> Manifest:
    cluster = config.cluster
    work, volumes = ray_container(
        config,
        "ray-worker",
        cpus=cluster.cpus_per_worker,
        memory_gib=config.deploy.worker_memory_gib,
        gpus=gpus,
    )
    spec = pod(config, [work], volumes=volumes, terminationGracePeriodSeconds=90)
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    counts = (0, 0, most) if autoscaling else (fewest, fewest, fewest)
    return {
        "groupName": name,
        **dict(zip(("replicas", "minReplicas", "maxReplicas"), counts, strict=True)),
        "rayStartParams": {},
        "template": {"spec": spec},
    }


def _job_spec(config: Config, arguments: Sequence[str]) -> Manifest:
    """What all jobs have. The submitter that follows the log is a pod of its own: it alone fails when the head does."""
    env = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "IPS_LOG_FORMAT": "json"}
    return {
        "entrypoint": shlex.join(["python", "-m", "pipeline", *arguments]),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 0},
        "backoffLimit": _RETRIES,
        "activeDeadlineSeconds": round(3600 * config.deploy.deadline_hours),
        "runtimeEnvYAML": json.dumps({"env_vars": env}),  # JSON is YAML
    }


def _rules() -> Manifest:
    """A failed application sets both states of failure, so neither rule may be faster than the other."""
    conditions = ({"jobStatus": "SUCCEEDED"}, {"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"})
    seconds = (_DONE_S, _FAILED_S, _FAILED_S)
    return {
        "deletionRules": [
            {"policy": "DeleteCluster", "condition": {**condition, "ttlSeconds": ttl}}
            for condition, ttl in zip(conditions, seconds, strict=True)
        ]
    }


def ray_cluster(config: Config, _arguments: Sequence[str]) -> list[Manifest]:
    """A cluster that stays, for `submit`."""
    name = label_name(config.name, _RAY_JOB_CHARS)
    spec = ray_cluster_spec(config, autoscaling=True)
    return [{"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata(config, name), "spec": spec}]


def _scaled(config: Config, arguments: Sequence[str]) -> Manifest:
    return {
        **_job_spec(config, arguments),
        "preRunningDeadlineSeconds": _NEVER_RAN_S,
        "deletionStrategy": _rules(),
        "rayClusterSpec": ray_cluster_spec(config, autoscaling=True),
    }


def ray_job(config: Config, arguments: Sequence[str]) -> list[Manifest]:
    """One job on a cluster of its own."""
    name = label_name(config.name, _RAY_JOB_CHARS)
    spec = _scaled(config, arguments)
    return [{"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata(config, name), "spec": spec}]


def ray_cron_job(config: Config, arguments: Sequence[str]) -> list[Manifest]:
    """The same by a schedule; alpha in KubeRay 1.7 and off, where missed ticks come one after another."""
    deploy, name = config.deploy, label_name(config.name, _RAY_CRON_JOB_CHARS)
    schedule = {"schedule": deploy.schedule, "timeZone": deploy.time_zone}
    spec = {**schedule, "suspend": False, "jobTemplate": _scaled(config, arguments)}
    return [{"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": metadata(config, name), "spec": spec}]


def kueue_job(config: Config, arguments: Sequence[str]) -> list[Manifest]:
    """One job that Kueue admits: begun suspended, of fixed size, and shut down whole, since rules go with neither."""
    name = label_name(config.name, _RAY_JOB_CHARS)
    spec = {
        **_job_spec(config, arguments),
        "backoffLimit": 0,
        "suspend": True,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _FAILED_S,
        "rayClusterSpec": ray_cluster_spec(config, autoscaling=False),
    }
    labels = {"kueue.x-k8s.io/queue-name": config.deploy.queue}
    return [{"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata(config, name, **labels), "spec": spec}]
