"""The image that serves a model, without Docker: linted, and its steps replayed in a venv of its own.

What they install comes from a registry, as on a host that never saw the product: the model's own requirements and
nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.models import Model

from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.tracking.package import gather_artifacts, write_package
from tests.pipeline.small import small_config, write_model, write_slide
from tests.pipeline.tracking.test_registry import features_config
from tests.processes import free_port, running

ROOT = Path(__file__).resolve().parents[1]

LOAD = """
import importlib.util, json, sys
import mlflow, pandas as pd
alone = {name: importlib.util.find_spec(name) is None for name in ("ray", "hydra", "pipeline", "ips")}
assert all(alone.values()), alone
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = pd.DataFrame({"uri": [sys.argv[2]]})
print(model.predict(rows, params={"top_k": 2, "explain": True}).to_json(orient="records", double_precision=15))
"""


def _dockerfile() -> str:
    text = (ROOT / "pipeline" / "results" / "README.md").read_text()
    (found,) = re.findall(r"```dockerfile\n(.*?)```", text, re.DOTALL)
    return str(found)


def _instructions() -> Iterator[tuple[str, str]]:
    """Name and text of each, in one line."""
    for line in re.sub(r"^#.*\n", "", _dockerfile(), flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


def test_it_is_clean(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(_dockerfile())
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "--no-color", tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def _package(folder: Path, config: Config) -> Path:
    """A registered model's folder, as `mlflow artifacts download` gives it."""
    own = folder / "own"
    own.mkdir(parents=True)
    write_model(own, config)
    write_package(folder / "model", gather_artifacts(own, config, folder), config, "a.png", Model())
    return folder / "model"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_its_steps_make_a_host_that_serves(tmp_path: Path) -> None:
    """A model of pixels over HTTP, and one of features loaded there: each gives the numbers that it gives here."""
    models = {
        "pixels": _package(tmp_path / "pixels", small_config()),
        "features": _package(tmp_path / "features", features_config(tmp_path / "w.pth")),
    }
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.png", 5)
    slide = str(tmp_path / "slides" / "a.png")
    env, command = _replayed(tmp_path, models["pixels"])
    with _served(command, tmp_path, env) as url:
        answer = _ask(url, [slide, str(tmp_path / "w.pth")], {"top_k": 2})
    good, outside = answer["predictions"]
    assert "this host does not serve files from there" in outside["error"]
    _same(good, tmp_path / "pixels" / "own", slide)
    assert len(good["top"]) == 2

    done = subprocess.run(
        ["python", "-c", LOAD, models["features"], slide],
        cwd=tmp_path,
        env={**env, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])
    _same(found, tmp_path / "features" / "own", slide)
    assert "effect_tumour_yes" in found["top"][0]


def _same(answer: dict[str, Any], own: Path, slide: str) -> None:
    assert answer["error"] is None
    model, config = load_model(own)
    expected = predict_slide(model, config, CohortSlide("a", slide, "p", None, None, {}, {})).values["tumour"]
    assert [answer["tumour_no"], answer["tumour_yes"]] == pytest.approx(expected, abs=1e-6)


def _replayed(folder: Path, model: Path) -> tuple[dict[str, str], list[str]]:
    """The environment of the image and what it runs, with the model and the slides at other places."""
    place = folder / "venv"
    venv.create(place, with_pip=True)
    env = {**os.environ, "PYTHONPATH": "", "VIRTUAL_ENV": str(place), "PATH": f"{place / 'bin'}:/usr/bin:/bin"}
    command, ran = [], 0
    for name, rest in _instructions():
        rest = rest.replace("/model", str(model)).replace("/slides", str(folder / "slides"))
        if name == "RUN":
            rest = re.sub(r" --extra-index-url \S+", "", rest)  # which build of torch is not what this is about
            done = subprocess.run(["bash", "-euc", rest], env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            ran += 1
        elif name == "ENV":
            env |= dict(part.split("=", 1) for part in rest.split())
        elif name == "CMD":
            command = json.loads(rest)
        else:
            assert name in {"FROM", "COPY", "USER"}
    assert ran == 1
    return env, command


@contextmanager
def _served(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[str]:
    """The image's command up to the end of a block; gives the address that answers."""
    port = free_port()
    replaced = {"0.0.0.0": "127.0.0.1", "8080": str(port)}
    words = [replaced.get(word, word) for word in command]
    with running(words, folder, f"http://127.0.0.1:{port}/ping", env):
        yield f"http://127.0.0.1:{port}/invocations"


def _ask(url: str, uris: list[str], params: dict[str, Any]) -> Any:
    body = json.dumps({"dataframe_records": [{"uri": uri} for uri in uris], "params": params})
    request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
