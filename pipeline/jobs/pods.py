"""Pods as all manifests have them: without rights, with credentials from secrets alone, sized as the config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.recipe import Config
from pipeline.errors import ConfigError

Manifest = dict[str, Any]

ENV_MAP = "ips-env"
"""The ConfigMap with the values of `deploy.env`."""
_USER = 1000  # `ray` of Ray's images
_SHARED_MEMORY = 0.25  # of a worker's memory, for Ray's object store: only references and rows travel through it


def image_of(config: Config) -> str:
    """The image of every pod; ConfigError where none is named."""
    if config.deploy.image is None:
        raise ConfigError(
            "manifest",
            [
                "deploy.image: is required, since a cluster pulls it; build it by the Dockerfile, push it, and name it "
                "with its version, as registry.example.org/ips:0.1.0"
            ],
        )
    return config.deploy.image


def metadata(config: Config, name: str, **labels: str) -> Manifest:
    """Name, namespace and labels."""
    own = {"app.kubernetes.io/name": "ips", "app.kubernetes.io/instance": name, **labels}
    return {"name": name, "namespace": config.deploy.namespace, "labels": own}


def label_name(name: str, longest: int = 63) -> str:
    """A config's name as Kubernetes takes it; ConfigError where it is too long for a kind, never cut in silence."""
    found = name.lower().replace("_", "-").replace(".", "-").strip("-")
    if len(found) > longest:
        raise ConfigError("manifest", [f"name: {found!r} has {len(found)} characters, and {longest} are allowed here"])
    return found


def variables(config: Config) -> list[Manifest]:
    """What every process of ours has in its environment, besides the secrets."""
    fixed = {"IPS_IMAGE": image_of(config), "IPS_LOG_FORMAT": "json"}
    values: list[Manifest] = [{"name": name, "value": value} for name, value in fixed.items()]
    named = [
        {"name": name, "valueFrom": {"configMapKeyRef": {"name": ENV_MAP, "key": name}}} for name in config.deploy.env
    ]
    return values + named


def container(
    name: str,
    image: str,
    *,
    cpus: float,
    memory_gib: float,
    gpus: float = 0,
    more: Mapping[str, Any] | None = None,
) -> Manifest:
    """A container that may do nothing but compute; memory is as much as it asks for, so that it is not evicted."""
    limits = {"memory": f"{round(memory_gib * 1024)}Mi", **({"nvidia.com/gpu": f"{gpus:g}"} if gpus else {})}
    return {
        "name": name,
        "image": image,
        **(more or {}),
        "resources": {"requests": {"cpu": f"{cpus:g}", **limits}, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def pod(config: Config, containers: Sequence[Manifest], **more: Any) -> Manifest:
    """A pod's spec: no root, no token of Kubernetes', the default seccomp profile."""
    return {
        "serviceAccountName": config.deploy.service_account,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **more,
        "containers": list(containers),
    }


def secrets(config: Config) -> list[Manifest]:
    """Where credentials come from: whole secrets as variables."""
    return [{"secretRef": {"name": name}} for name in config.deploy.secrets]


def ray_container(
    config: Config, name: str, *, cpus: float, memory_gib: float, gpus: float = 0, more: Mapping[str, Any] | None = None
) -> tuple[Manifest, list[Manifest]]:
    """A container of the pipeline's image, and the volumes it mounts: Ray's shared memory and scratch space.

    GPUs are whole: a share of one that workers have is Ray's business, not Kubernetes'.
    """
    if gpus and gpus != int(gpus):
        gpus = 1
    shared = f"{round(memory_gib * 1024 * _SHARED_MEMORY)}Mi"
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/tmp"}]
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
        {"name": "scratch", "emptyDir": {}},
    ]
    own = {"env": variables(config), "envFrom": secrets(config), "volumeMounts": mounts}
    made = container(
        name,
        image_of(config),
        cpus=cpus,
        memory_gib=memory_gib,
        gpus=gpus,
        more={**own, **(more or {})},
    )
    return made, volumes
