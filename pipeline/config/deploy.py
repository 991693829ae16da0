"""Submitting to a cluster, and the manifests of one: who runs a recipe, when and in which image (execution)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from pipeline.config.base import Section
from pipeline.credentials import is_secret_variable

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A name as Kubernetes has them."""
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


class DeployConfig(Section):
    """What `submit` and `manifest` need to know beside the recipe."""

    address: str | None = None
    """Of the cluster's job server: http://HEAD:8265. null: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, then port 8265 of
    this machine."""
    env: tuple[Annotated[str, Field(pattern=_VARIABLE)], ...] = ()
    """Names of variables that a job gets as they are where it is submitted; Ray keeps their values, so no secrets."""
    patience_minutes: Annotated[float, Field(gt=0)] = 30.0
    """How long the job server may be silent before `submit` gives up with exit code 7."""
    package_mb: Annotated[float, Field(gt=0, le=500)] = 20.0
    """Largest working directory that `submit` sends; Ray keeps it in the head's memory."""
    command: Annotated[tuple[str, ...], Field(min_length=1)] = ("run",)
    """What a manifest's job runs, without the config's name and overrides."""
    image: str | None = None
    """Of every pod, as registry.example.org/ips:0.1.0; `manifest` needs it."""
    namespace: Label = "ips"
    secrets: tuple[Label, ...] = ("ips-credentials",)
    """Kubernetes secrets, whose entries become variables of every pod: here credentials come from."""
    service_account: Label = "ips"
    """Of every pod; a cloud's role for S3 hangs on it. Pods get no token of Kubernetes'."""
    schedule: Annotated[str, Field(pattern=r"^(@\w+|(\S+ ){4}\S+)$")] = "0 2 * * 1"
    """Cron's five fields, or @weekly and the like."""
    time_zone: str = "Etc/UTC"
    """Of the schedule, as the tz database names them."""
    queue: Label = "ips"
    """Kueue's local queue."""
    head_cpus: Annotated[float, Field(gt=0)] = 2.0
    """Of the head's pod, where the driver runs; Ray places no work there."""
    head_memory_gib: Annotated[float, Field(gt=0)] = 8.0
    worker_memory_gib: Annotated[float, Field(gt=0)] = 16.0
    """Of each worker's pod, a quarter of it for Ray's object store in /dev/shm."""
    tilers: Annotated[int, Field(ge=0)] = 4
    """Pods without GPU beside workers that have some, so that slides are not tiled on GPU nodes; at most, where a
    cluster grows and shrinks."""
    artifacts: Annotated[str, Field(pattern=r"^s3://")] = "s3://mlflow"
    """Where the manifests' MLflow server keeps artifacts."""
    storage_class: str | None = None
    """Of the volumes of PostgreSQL and of the S3 server. null: the cluster's default."""
    deadline_hours: Annotated[float, Field(gt=0)] = 72.0
    """A job that takes longer is ended; what it has saved is kept."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        secret = [name for name in names if is_secret_variable(name)]
        if secret:
            raise ValueError(
                f"{', '.join(secret)}: credentials by their name, and Ray keeps what a job is given; put them into the "
                "environment of every node (deploy.secrets), not into the job"
            )
        return names

    @field_validator("schedule")
    @classmethod
    def _no_zone(cls, schedule: str) -> str:
        if "TZ=" in schedule:
            raise ValueError("holds a time zone, which KubeRay refuses there; set deploy.time_zone")
        return schedule
