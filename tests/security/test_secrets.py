"""Passwords and tokens come out nowhere, wherever they are planted: on disk, in MLflow, in logs, pages and models."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from tests.processes import serve_mlflow
from tests.s3 import SECRET as S3_SECRET
from tests.s3 import serve_s3
from tests.security.guard import credentials, guarded

REPO = Path(__file__).resolve().parents[2]
SECRET = "PlantedPa55word"
URIS = (
    f"http://svc:{SECRET}@127.0.0.1:5000",
    f"https://{SECRET}@host.example/x",
    f"postgresql://svc:{SECRET}@db/mlflow",
    f"s3://AKIA:ab/{SECRET}@bucket/key",
    f"s3://bucket/key?X-Amz-Signature={SECRET}",
    f"https://host.example/a.svs?token={SECRET}&v=1",
    f"svc:{SECRET}@host:5000",
    f"http://svc:my {SECRET}@host",
)


def _fields(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value of a config, whatever its type; those of tasks below `tasks`."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        yield from [(*path, name)] if inner is None else _fields(inner, (*path, name))


def _section(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    return next((found for member in get_args(annotation) if (found := _section(member)) is not None), None)


def _planted(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A config with a value at a path, and nothing else given but what is required."""
    plain: dict[str, Any] = {"name": "n", "cohort": {"uri": "c.csv"}, "tasks": [{"name": "t", "column": "label"}]}
    if path[0] == "tasks":
        plain["tasks"][0][path[1]] = value
        return plain
    if path[:2] in (("gate", "floors"), ("gate", "strata")):
        return {**plain, "gate": {path[1]: [{path[2]: value}]}}
    if path[:2] == ("sweep", "cohorts"):
        return {**plain, "sweep": {"cohorts": {"other": {path[2]: value}}}}
    section = plain
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = value
    return plain


FIELDS = list(_fields(Config))


def test_every_place_of_a_config_is_looked_at() -> None:
    dotted = {".".join(path) for path in FIELDS}
    assert {"tracking.uri", "storage.root", "cohort.uri", "cohort.megapixel_mnist.folder", "tasks.column"} <= dotted
    assert {
        "tiling.coords",
        "tiling.cache",
        "cohort.features",
        "model.encoder.weights",
        "embed.encoder.weights",
    } <= dotted


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_no_field_takes_a_credential(path: tuple[str, ...]) -> None:
    for uri in URIS:
        for value in (uri, [uri]):
            with pytest.raises(ValidationError, match="holds a password or token|must be a number from 1") as caught:
                Config.model_validate(_planted(path, value))
            assert SECRET not in str(caught.value)


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(
    "field", ["tracking.uri", "storage.root", "train.lr", "model.select.memory", "cluster.workers"]
)
def test_a_config_error_repeats_no_credential(field: str, uri: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: (holds|must be a number)") as caught:
        load_config("demo", [f"{field}={uri}", "train.explore_epochs=1", "model.select.mode=every", "a.b=1"])
    assert SECRET not in str(caught.value)


@dataclass(frozen=True)
class Scene:
    """A folder whose `made` gets all that comes out, a checkout of the product, and the environment."""

    folder: Path
    env: Mapping[str, str]

    @property
    def made(self) -> Path:
        """Everything below it is searched."""
        return self.folder / "made"

    def ips(self, *arguments: str, code: int = 0, **env: str) -> str:
        """Run a command of the product; what it says is kept among what came out."""
        return self.python(["-m", "pipeline", *arguments], code, env)

    def python(self, arguments: Sequence[str], code: int = 0, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder / "checkout",
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        number = len(list(self.made.glob("said-*")))
        (self.made / f"said-{number}").write_text(done.stdout + done.stderr)
        assert done.returncode == code, done.stderr[-4000:]
        return done.stdout


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made, checkout = tmp_path / "made", tmp_path / "checkout"
    for name in ("home", "tmp"):
        (made / name).mkdir(parents=True)
    for name in ("ips", "pipeline", "conf"):
        shutil.copytree(REPO / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(checkout), *command], check=True)
    remote = f"https://x-access-token:{SECRET}@github.example/a/b.git"
    subprocess.run(["git", "-C", str(checkout), "remote", "add", "origin", remote], check=True)
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_", "PYTHON"))},
        "HOME": str(made / "home"),
        "TMPDIR": str(made / "tmp"),
        "MLFLOW_TRACKING_USERNAME": "svc",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "DB_PASSWORD": SECRET,
        "HF_TOKEN": f"hf_{SECRET}",
        "IPS_IMAGE": f"https://u:{SECRET}@registry.example/ips:1",
    }
    short = tempfile.mkdtemp(prefix="ips", dir="/tmp")  # Ray's sockets allow 107 characters
    try:
        yield Scene(tmp_path, {**env, "RAY_TMPDIR": short})
    finally:
        shutil.rmtree(short)


def _contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file's bytes; of compressed ones also what is in them."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        yield path, data
        if path.suffix == ".parquet":
            yield path, repr(pq.read_table(path).to_pydict()).encode()
            yield path, repr(pq.read_schema(path).metadata).encode()
        elif path.suffix == ".gz":
            yield path, gzip.decompress(data)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield path, archive.read(name)


def _holding(folder: Path, text: str) -> list[str]:
    """Which files hold a text."""
    return sorted({str(path.relative_to(folder)) for path, data in _contents(folder) if text.encode() in data})


QUICK = (
    "train.epochs=2", "train.explore_epochs=0", "train.warmup_epochs=1", "model.select.memory=4",
    "evaluate.bootstrap=50", "cohort.demo.slides=24",
)  # fmt: skip

SERVE = """
import sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
print(model.predict(pd.DataFrame({"uri": sys.argv[2:]})).to_dict())
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_nothing_that_comes_out_holds_a_secret(scene: Scene) -> None:
    with ExitStack() as stack:
        s3 = stack.enter_context(serve_s3(scene.made / "s3"))
        bucket = s3.bucket("hospital")
        (scene.made / "mlflow").mkdir()
        server = stack.enter_context(serve_mlflow(scene.made / "mlflow"))
        proxy = stack.enter_context(guarded(server, "svc", SECRET))
        scene = Scene(scene.folder, {**scene.env, **s3.env})
        place = [f"storage.root={bucket}/root", f"cohort.uri={bucket}/in/cohort.csv", f"tracking.uri={proxy}"]
        study = ["--config", "demo", *place, "name=marked-study", *QUICK]
        _everything(scene, study, proxy, f"{bucket}/in/slides/demo-0003.tif")
        _refusals(scene, study, proxy)
    shutil.copytree(Path(scene.env["RAY_TMPDIR"]), scene.made / "ray", ignore=_no_plain_files)
    for secret in (SECRET, S3_SECRET, credentials("svc", SECRET)):
        assert _holding(scene.made, secret) == []
    seen = {*_holding(scene.made, "marked-study"), *_holding(scene.made, "demo-000")}  # where they could have been
    for name in ("mlflow/server.db", "report.html", "said-0", "predictions/predictions.parquet", "input_example.json"):
        assert any(path.endswith(name) for path in seen), name
    configs = [path.removeprefix("s3/hospital/root/") for path in seen if path.endswith("config.json")]
    assert {"artifacts", "train"} <= {path.partition("/")[0] for path in configs}
    assert any(path.startswith("ray/") for path in _holding(scene.made, "TrainController"))


def _no_plain_files(folder: str, names: list[str]) -> set[str]:
    """Ray's sockets cannot be copied."""
    return {name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()}


def _everything(scene: Scene, study: Sequence[str], proxy: str, slide: str) -> None:
    """All stages and what follows them; the password is needed, and found, in workers too."""
    said = json.loads(scene.ips("run", *study, "--json"))
    assert {stage["outcome"] for stage in said["stages"].values()} == {"done"}
    scene.ips("plan", *study)
    encoder = ["embed.encoder.name=resnet18", "embed.encoder.stages=2"]
    scene.ips("embed", *study, *encoder)
    scene.ips("doctor", *study)
    scene.ips("qc", *study)
    scene.ips("verify", f"{said['root']}/patches/{Path(said['stages']['tile']['outputs']['store']).name}")
    model = ["--model", "models:/marked-study@champion"]
    out = ["--out", str(scene.made / "predictions")]
    scene.ips("predict", *model, "--tracking-uri", proxy, *out, slide)
    answer = scene.python(
        ["-c", SERVE, "models:/marked-study@champion", slide, *URIS], env={"MLFLOW_TRACKING_URI": proxy}
    )
    assert answer.count("holds a password or token") == len(URIS)
    scene.ips("predict", *model, "--tracking-uri", proxy, *out, slide, code=1, MLFLOW_TRACKING_PASSWORD="wrong")


def _refusals(scene: Scene, study: Sequence[str], proxy: str) -> None:
    """Secrets where they must not be given: all of it is refused."""
    model = ["--model", "models:/marked-study@champion"]
    for field in (
        "tracking.uri",
        "storage.root",
        "cohort.uri",
        "model.encoder.weights",
        "tiling.coords",
        "tiling.cache",
        "cohort.features",
    ):
        scene.ips("run", *study, f"{field}={URIS[0]}", code=2)
    scene.ips("run", *study, "tracking.experiment=${oc.env:DB_PASSWORD}", code=2)
    scene.ips("run", *study, f"tracking.experiment={SECRET}", code=2)
    scene.ips("predict", *model, *URIS, code=2)
    scene.ips("predict", *model, "a.png", code=1, MLFLOW_TRACKING_URI=URIS[0])
    given = scene.folder / "given"
    given.mkdir()
    cohort = given / "cohort.csv"
    cohort.write_text(
        "slide_id,uri,mask,coords,features,site,label\n" + "".join(f"{','.join([uri] * 7)}\n" for uri in URIS)
    )
    scene.ips("tile", f"cohort.uri={cohort}", f"storage.root={scene.made / 'root'}", code=2)
    scene.ips("predict", *model, "--cohort", str(cohort), "--tracking-uri", proxy, code=2)
    shutil.copytree(scene.folder / "checkout" / "conf", given / "conf")
    (given / "conf" / "tracked.yaml").write_text(f"defaults: [demo]\ntracking:\n  uri: http://svc:a {SECRET}@h\n")
    scene.ips("run", "--config", "tracked", "--config-dir", str(given / "conf"), code=2)
    scene.ips("plan", *study, code=1, AWS_ENDPOINT_URL=f"http://svc:{SECRET}@127.0.0.1:9")
