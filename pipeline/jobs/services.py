"""Manifests of what stands around: a CronJob, the namespace, MLflow with PostgreSQL, an S3 server for one's own disks.

Passwords come from `deploy.secrets`: PGPASSWORD for MLflow, POSTGRES_PASSWORD for PostgreSQL (the same one),
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3's clients and its server.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, DataBudgetError, ResourceError
from pipeline.jobs.pods import (
    Manifest,
    container,
    image_of,
    label_name,
    metadata,
    pod,
    ray_container,
    secrets,
    variables,
)

POSTGRES_IMAGE = "postgres:17.6-bookworm"
S3_IMAGE = "rclone/rclone:1.71.0"
MLFLOW_PORT, POSTGRES_PORT, S3_PORT = 5000, 5432, 8333
BUCKET = "mlflow"
"""Of MLflow's artifacts."""
_NO_CLUSTER = (
    "cluster.address={} needs a cluster, and the pod has none: set deploy.address=http://NAME-head-svc:8265, to submit "
    "to one (kind raycluster), or cluster.address=null for a Ray in the pod"
)
_GRACE_S = 90  # for a driver to mark its runs, and its workers to write a checkpoint
_GATE, _OVERDUE = 4, 6  # of `release`: a model was refused; no slide came for too long
_FINAL = [ConfigError.exit_code, DataBudgetError.exit_code, _GATE, ResourceError.exit_code, _OVERDUE]
_CRON_CHARS = 52  # Kubernetes appends 11 to the name
_POSTGRES_USER = 999  # of PostgreSQL's image


def mlflow_command(database_host: str, hosts: str, artifacts: str = f"s3://{BUCKET}") -> list[str]:
    """MLflow's server on PostgreSQL and S3.

    Args:
        database_host: of PostgreSQL; its password comes from PGPASSWORD. The driver is named, for SQLAlchemy 2.1 takes
            another one by itself.
        hosts: names by which clients may call the server; a service's own is refused otherwise.
        artifacts: where they are kept.
    """
    return [
        *("mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT)),
        *("--backend-store-uri", f"postgresql+psycopg2://mlflow@{database_host}:{POSTGRES_PORT}/mlflow"),
        *("--artifacts-destination", artifacts, "--workers", "2", "--allowed-hosts", hosts),
    ]


def s3_command(folder: str) -> list[str]:
    """An S3 server on a folder, each folder in it a bucket; the key's id and secret come from the environment."""
    key = '"$AWS_ACCESS_KEY_ID,$AWS_SECRET_ACCESS_KEY"'
    make = f"mkdir -p {folder}/{BUCKET} {folder}/ips"
    return ["sh", "-c", f"{make} && exec rclone serve s3 --addr :{S3_PORT} --auth-key {key} {folder}"]


def cron_job(config: Config, arguments: Sequence[str]) -> list[Manifest]:
    """A command by a schedule, never twice at once: on a cluster where `deploy.address` names one, else in its pod.

    What trying again cannot mend (config, data, gate, resources) ends the job at once.
    """
    deploy, cluster, name = config.deploy, config.cluster, label_name(config.name, _CRON_CHARS)
    program, workers = ["python", "-m", "pipeline"], cluster.fewest_workers
    env: list[Manifest] = []
    if deploy.address is None:
        if cluster.address is not None:
            raise ConfigError("manifest", [_NO_CLUSTER.format(cluster.address)])
        command = [*program, *arguments]
        cpus, memory = workers * cluster.cpus_per_worker, workers * deploy.worker_memory_gib
        gpus = workers * cluster.gpus_per_worker
    else:
        command = [*program, "submit", "--working-dir", "/opt/ips", "--detach", *arguments]
        cpus, memory, gpus = 1.0, 2.0, 0.0
        token = {"secretKeyRef": {"name": label_name(config.name), "key": "auth_token"}}  # that KubeRay makes
        env = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]
    work, volumes = ray_container(
        config, "ips", cpus=cpus, memory_gib=memory, gpus=gpus, more={"command": command, "workingDir": "/opt/ips"}
    )
    work["env"] += env
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "ips", "operator": "In", "values": _FINAL}}
    spec = pod(config, [work], volumes=volumes, restartPolicy="Never", terminationGracePeriodSeconds=_GRACE_S)
    job = {
        "backoffLimit": 2,
        "activeDeadlineSeconds": round(3600 * deploy.deadline_hours),
        "podFailurePolicy": {"rules": [rule]},
        "template": {"metadata": {"labels": metadata(config, name)["labels"]}, "spec": spec},
    }
    schedule = {
        "schedule": deploy.schedule,
        "timeZone": deploy.time_zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    return [{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata(config, name), "spec": schedule}]


def namespace(config: Config, _arguments: Sequence[str]) -> list[Manifest]:
    """Namespace, service account, and a policy by which only pods of the namespace reach one another's ports."""
    deploy = config.deploy
    enforced = {"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/warn": "restricted"}
    account = {"metadata": metadata(config, deploy.service_account), "automountServiceAccountToken": False}
    inside = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": deploy.namespace, "labels": enforced}},
        {"apiVersion": "v1", "kind": "ServiceAccount", **account},
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(config, "ips-inside"),
            "spec": inside,
        },
    ]


def mlflow(config: Config, _arguments: Sequence[str]) -> list[Manifest]:
    """MLflow's server and its PostgreSQL."""
    inside = f"mlflow,mlflow:{MLFLOW_PORT},mlflow.{config.deploy.namespace},mlflow.{config.deploy.namespace}.svc"
    hosts = f"{inside},{inside.replace(',', f':{MLFLOW_PORT},')}:{MLFLOW_PORT},localhost,localhost:{MLFLOW_PORT}"
    env = [*variables(config), {"name": "HOME", "value": "/tmp"}]
    server = container(
        "mlflow",
        image_of(config),
        cpus=1,
        memory_gib=2,
        more={
            "command": mlflow_command("postgres", hosts, config.deploy.artifacts),
            "env": env,
            "envFrom": secrets(config),
            "ports": [{"name": "http", "containerPort": MLFLOW_PORT}],
            "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
            "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "initialDelaySeconds": 120},
        },
    )
    template = {"metadata": {"labels": {"app": "mlflow"}}, "spec": pod(config, [server])}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(config, "mlflow"),
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "mlflow"}}, "template": template},
    }
    return [*_postgres(config), deployment, _service(config, "mlflow", MLFLOW_PORT)]


def _postgres(config: Config) -> list[Manifest]:
    database = container(
        "postgres",
        POSTGRES_IMAGE,
        cpus=0.5,
        memory_gib=1,
        more={
            "env": [
                {"name": "POSTGRES_USER", "value": "mlflow"},
                {"name": "POSTGRES_DB", "value": "mlflow"},
                {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"},
            ],
            "envFrom": secrets(config),
            "ports": [{"name": "sql", "containerPort": POSTGRES_PORT}],
            "readinessProbe": {"exec": {"command": ["pg_isready", "-U", "mlflow"]}, "periodSeconds": 5},
            "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
        },
    )
    spec = pod(config, [database])
    spec["securityContext"] |= {"runAsUser": _POSTGRES_USER, "fsGroup": _POSTGRES_USER}
    return _stateful(config, "postgres", spec, POSTGRES_PORT, "20Gi")


def s3(config: Config, _arguments: Sequence[str]) -> list[Manifest]:
    """An S3 server where there is none: rclone on one volume, with the buckets `mlflow` and `ips`."""
    server = container(
        "s3",
        S3_IMAGE,
        cpus=1,
        memory_gib=1,
        more={
            "command": s3_command("/data"),
            "env": [{"name": "HOME", "value": "/tmp"}],
            "envFrom": secrets(config),
            "ports": [{"name": "s3", "containerPort": S3_PORT}],
            "readinessProbe": {"tcpSocket": {"port": "s3"}, "periodSeconds": 5},
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        },
    )
    return _stateful(config, "s3", pod(config, [server]), S3_PORT, "500Gi")


def _stateful(config: Config, name: str, spec: Manifest, port: int, size: str) -> list[Manifest]:
    """One pod with a volume of its own, and its service."""
    claim: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    if config.deploy.storage_class is not None:
        claim["storageClassName"] = config.deploy.storage_class
    state = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(config, name),
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
        },
    }
    return [state, _service(config, name, port)]


def _service(config: Config, name: str, port: int) -> Manifest:
    spec = {"selector": {"app": name}, "ports": [{"port": port, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(config, name), "spec": spec}
