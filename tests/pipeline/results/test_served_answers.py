"""What `mlflow models serve` answers to a client that is not Python, whose JSON knows no NaN."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.models import Model

from pipeline.cohort.table import CohortSlide
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.folder import CONFIG, WEIGHTS
from pipeline.tracking.package import write_package
from tests.pipeline.small import small_config, write_model, write_slide
from tests.processes import serve_model

NODE = shutil.which("node")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NODE is None, reason="node is not installed")]

ASK = """
const [url, body] = process.argv.slice(1);
const answer = await fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body});
console.log(JSON.stringify([answer.status, JSON.parse(await answer.text())]));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    for name in ("own", "slides", "elsewhere"):
        (folder / name).mkdir()
    write_model(folder / "own", small_config())
    files = {"weights": str(folder / "own" / WEIGHTS), "config": str(folder / "own" / CONFIG)}
    write_package(folder / "model", files, small_config(), "a.png", Model())
    write_slide(folder / "slides" / "good.png", 5)
    write_slide(folder / "elsewhere" / "secret.png", 6)
    (folder / "slides" / "link.png").symlink_to(folder / "elsewhere" / "secret.png")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    env = {"IPS_ALLOWED_ROOTS": f"{folder / 'slides'},s3://hospital/slides", "IPS_MAX_ROWS": "8", "PYTHONPATH": ""}
    with serve_model(str(folder / "model"), folder, env) as url:
        yield url


def _ask(url: str, **body: Any) -> tuple[int, Any]:
    assert NODE is not None
    command = [NODE, "--input-type=module", "--eval", ASK, url, json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    status, answer = json.loads(done.stdout)
    return int(status), answer


def test_good_and_bad_slides_in_one_request(url: str, folder: Path) -> None:
    uris = ["good.png", "absent.png", "link.png", "../elsewhere/secret.png"]
    rows: list[dict[str, Any]] = [
        {"uri": str(folder / "slides" / uri), "mpp": mpp} for uri, mpp in zip(uris, (0.5, None, 1, 2), strict=True)
    ]
    rows += [{"uri": uri, "mpp": None} for uri in ("s3://hospital/other/a.svs", "s3://KEY:Pa55@hospital/slides/a.svs")]
    status, answer = _ask(url, dataframe_records=rows)
    assert status == 200
    good, *bad = answer["predictions"]
    model, config = load_model(folder / "own")
    slide = CohortSlide("good", rows[0]["uri"], "p", None, None, {}, {})
    expected = predict_slide(model, config, slide).values["tumour"]
    assert list(good) == ["uri", "tumour_no", "tumour_yes", "error"]
    assert [good["tumour_no"], good["tumour_yes"]] == pytest.approx(expected, abs=1e-5)
    assert (good["uri"], good["error"]) == (rows[0]["uri"], None)
    assert {(row["tumour_no"], row["tumour_yes"]) for row in bad} == {(None, None)}
    absent, *outside, leaking = (row["error"] for row in bad)
    assert "it does not exist" in absent
    assert all("this host does not serve files from there" in error for error in outside)
    assert "AWS_SECRET_ACCESS_KEY" in leaking
    assert "Pa55" not in json.dumps(answer) + (folder / "log").read_text()


def test_a_request_without_mpp_or_rows(url: str, folder: Path) -> None:
    status, answer = _ask(url, dataframe_split={"columns": ["uri"], "data": [[str(folder / "slides" / "good.png")]]})
    assert (status, answer["predictions"][0]["error"]) == (200, None)
    status, answer = _ask(url, dataframe_split={"columns": ["uri"], "data": []})
    assert (status, answer["predictions"]) == (200, [])


def test_too_much_and_nonsense_are_refused_in_json(url: str) -> None:
    status, answer = _ask(url, dataframe_records=[{"uri": "a.svs"}] * 9)
    assert status == 400
    assert "9 slides in one request, and 8 are allowed (IPS_MAX_ROWS)" in answer["message"]
    status, answer = _ask(url, dataframe_records=[{"slide": "a.svs"}])
    assert status == 400
    assert "uri" in answer["message"]
