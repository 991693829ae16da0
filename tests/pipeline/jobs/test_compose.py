from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.jobs.compose import compose
from pipeline.jobs.services import BUCKET, MLFLOW_PORT, POSTGRES_PORT, S3_PORT, mlflow_command, s3_command
from pipeline.tracking.tracker import open_tracking
from tests.pipeline.jobs.head import REPO, serve_head, wait_for
from tests.pipeline.small import small_config
from tests.processes import free_port
from tests.s3 import KEY_ID, SECRET

_TOKEN = "TokenOfTheComposedCluster0123456789"
_SMALL = ("cohort.demo.slides=12", "train.epochs=1", "train.warmup_epochs=0", "train.explore_epochs=0")
# The fields of the Compose specification that are used; docker compose refuses others.
_FIELDS = {
    "image",
    "restart",
    "security_opt",
    "environment",
    "volumes",
    "healthcheck",
    "entrypoint",
    "ports",
    "command",
}
_FIELDS |= {"depends_on", "shm_size"}


def _services() -> dict[str, Any]:
    (made,) = compose(small_config(deploy={"image": "ips:0.1.0"}), [])
    assert set(made) == {"name", "services", "volumes"}
    services: dict[str, Any] = made["services"]
    return services


def test_all_services_are_there_and_have_known_fields() -> None:
    services = _services()
    assert set(services) == {"postgres", "s3", "mlflow", "ray"}
    for service in services.values():
        assert set(service) <= _FIELDS
        for name in service.get("depends_on", ()):
            assert "healthcheck" in services[name]


def test_ports_are_the_loopback_s_alone_and_ray_asks_for_a_token() -> None:
    services = _services()
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["ray"]["environment"]["RAY_AUTH_MODE"] == "token"


def test_passwords_come_from_outside_and_must() -> None:
    for service in _services().values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY", name):
                assert re.fullmatch(r"\$\{(\w+):\?set \1\}", value), name
    assert '"$$AWS_ACCESS_KEY_ID,$$AWS_SECRET_ACCESS_KEY"' in _services()["s3"]["entrypoint"][2]


@contextmanager
def _running(command: Sequence[str], env: Mapping[str, str], log: Path, user: str | None = None) -> Iterator[None]:
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=said, stderr=said, user=user, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@contextmanager
def _postgres(folder: Path, port: int, password: str) -> Iterator[None]:
    """PostgreSQL of this machine, as its image would begin; as another user where the tests are root's."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    user = "postgres" if os.geteuid() == 0 else None
    if not programs or (user and user not in {entry.pw_name for entry in pwd.getpwall()}):
        pytest.skip("PostgreSQL is not installed")
    place = folder / "database"
    place.mkdir()
    (folder / "password").write_text(password)
    for path in (place, folder / "password"):
        shutil.chown(path, user or os.geteuid())
    for path in (folder, *folder.parents[:3]):  # pytest keeps its folders to its own user
        path.chmod(0o755)
    init = [str(programs[-1]), "-D", str(place), "-U", "mlflow", "--auth=scram-sha-256"]
    init.append(f"--pwfile={folder / 'password'}")
    subprocess.run(init, user=user, check=True, stdout=subprocess.DEVNULL)
    command = [str(programs[-1].parent / "postgres"), "-D", str(place), "-p", str(port), "-k", ""]
    with _running(command, {}, folder / "postgres.log", user):
        ready = [str(programs[-1].parent / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, check=False, stdout=subprocess.DEVNULL).returncode:
            pass
        create = [str(programs[-1].parent / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        subprocess.run(create, env={"PGPASSWORD": password}, check=True)
        yield


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_services_work_together_by_their_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without containers: ports and hosts are this machine's, all else is what the file says."""
    database, bucket, server = free_port(), free_port(), free_port()
    bin_ = Path(sys.executable).parent
    path = f"{bin_}:{os.environ['PATH']}"
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    (tmp_path / "s3").mkdir()
    s3 = [part.replace(f":{S3_PORT}", f"127.0.0.1:{bucket}") for part in s3_command(str(tmp_path / "s3"))]
    hosts = f"localhost:{server},127.0.0.1:{server}"
    mlflow = [
        part.replace(str(MLFLOW_PORT), str(server)).replace(f":{POSTGRES_PORT}", f":{database}")
        for part in mlflow_command("127.0.0.1", hosts)
    ]
    env = {**keys, "PATH": path, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket}", "PGPASSWORD": "only-for-this-test"}
    with (
        _postgres(tmp_path, database, "only-for-this-test"),
        _running(s3, {**keys, "PATH": path}, tmp_path / "s3.log"),
        _running(mlflow, env, tmp_path / "mlflow.log"),
    ):
        uri = f"http://127.0.0.1:{server}"
        wait_for(f"{uri}/health", 200)
        for name in (*keys, "AWS_ENDPOINT_URL"):  # as a run's driver, on `storage.root=s3://ips/study`
            monkeypatch.setenv(name, env[name])
        tracker = open_tracking(uri, "stack", "s3://ips/study/artifacts")
        with tracker.run("one") as run_id:
            tracker.log_metrics(run_id, {"auc": 0.75})
            tracker.log_text(run_id, "kept", "note.txt")
        assert tracker.latest_metrics(run_id) == {"auc": 0.75}
        head_env = {**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
        with serve_head(_services()["ray"]["command"], **head_env) as head:
            submit = [sys.executable, "-m", "pipeline", "submit", "--working-dir", str(REPO / "conf"), "--json"]
            places = ["storage.root=s3://ips/night", f"tracking.uri={uri}", f"deploy.address={head.address}"]
            command = [*submit, "run", "--config", "demo", *places, *_SMALL]
            done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        run = tracker.client.get_run(json.loads(done.stdout)["run_id"])
        assert run.info.status == "FINISHED"
        assert tracker.client.get_model_version_by_alias("demo", "champion").run_id
    assert (tmp_path / "s3" / BUCKET).is_dir()
    (kept,) = (tmp_path / "s3" / "ips" / "study").rglob("note.txt")
    assert kept.read_text() == "kept"
