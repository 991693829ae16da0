"""A docker compose file: MLflow on PostgreSQL and S3, and a Ray head, all on one machine."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.recipe import Config
from pipeline.jobs.pods import Manifest, image_of
from pipeline.jobs.services import MLFLOW_PORT, POSTGRES_IMAGE, S3_IMAGE, S3_PORT, mlflow_command, s3_command

DASHBOARD_PORT = 8265
_ASK = f'import urllib.request; urllib.request.urlopen("http://localhost:{MLFLOW_PORT}/health")'
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def compose(config: Config, _arguments: Sequence[str]) -> list[Manifest]:
    """The services. Ports are the loopback's; passwords come from the shell or a file `.env` beside, and must be set.

    Jobs go to the head as on any cluster, and find MLflow and S3 by their names there.
    """
    hosts = f"mlflow,mlflow:{MLFLOW_PORT},localhost,localhost:{MLFLOW_PORT},127.0.0.1,127.0.0.1:{MLFLOW_PORT}"
    return [
        {
            "name": "ips",
            "services": {
                "postgres": _service(
                    POSTGRES_IMAGE,
                    environment={
                        "POSTGRES_USER": "mlflow",
                        "POSTGRES_DB": "mlflow",
                        "POSTGRES_PASSWORD": _required("PGPASSWORD"),
                    },
                    volumes=["postgres:/var/lib/postgresql/data"],
                    healthcheck=_check("pg_isready -U mlflow"),
                ),
                "s3": _service(
                    S3_IMAGE,
                    entrypoint=_quoted(s3_command("/data")),
                    environment={key: _required(key) for key in _KEYS},
                    ports=[f"127.0.0.1:{S3_PORT}:{S3_PORT}"],
                    volumes=["s3:/data"],
                    healthcheck=_check(f"nc -z localhost {S3_PORT}"),
                ),
                "mlflow": _service(
                    image_of(config),
                    command=mlflow_command("postgres", hosts),
                    environment={**_s3_client(), "PGPASSWORD": _required("PGPASSWORD")},
                    ports=[f"127.0.0.1:{MLFLOW_PORT}:{MLFLOW_PORT}"],
                    depends_on={name: {"condition": "service_healthy"} for name in ("postgres", "s3")},
                    healthcheck=_check(f"python -c '{_ASK}'"),
                ),
                "ray": _service(
                    image_of(config),
                    command=["ray", "start", "--head", "--block", "--dashboard-host", "0.0.0.0"],
                    environment={
                        **_s3_client(),
                        "MLFLOW_TRACKING_URI": f"http://mlflow:{MLFLOW_PORT}",
                        "RAY_AUTH_MODE": "token",
                        "RAY_AUTH_TOKEN": _required("RAY_AUTH_TOKEN"),
                    },
                    ports=[f"127.0.0.1:{DASHBOARD_PORT}:{DASHBOARD_PORT}"],
                    shm_size=f"{config.deploy.worker_memory_gib / 4:g}gb",
                    depends_on={"mlflow": {"condition": "service_healthy"}},
                ),
            },
            "volumes": {"postgres": {}, "s3": {}},
        }
    ]


def _service(image: str, **fields: object) -> Manifest:
    return {"image": image, "restart": "unless-stopped", "security_opt": ["no-new-privileges:true"], **fields}


def _required(variable: str) -> str:
    """Compose's own way to take a variable from the shell, and to end where it is not set."""
    return f"${{{variable}:?set {variable}}}"


def _quoted(command: Sequence[str]) -> list[str]:
    """Compose would fill in the variables itself, and so show passwords in the process list of its own."""
    return [part.replace("$", "$$") for part in command]


def _s3_client() -> dict[str, str]:
    endpoint = {"AWS_ENDPOINT_URL": f"http://s3:{S3_PORT}", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**endpoint, **{key: _required(key) for key in _KEYS}}


def _check(command: str) -> dict[str, object]:
    return {"test": ["CMD-SHELL", command], "interval": "5s", "timeout": "5s", "retries": 24}
