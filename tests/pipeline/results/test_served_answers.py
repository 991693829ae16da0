"""What `mlflow models serve` answers to a client that is not Python, whose JSON knows no NaN."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.models import Model

from pipeline.cohort.table import CohortSlide
from pipeline.inference.explain import explain
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.folder import CONFIG, WEIGHTS
from pipeline.tracking.package import write_package
from tests.pipeline.small import small_config, write_model, write_slide
from tests.processes import serve_model
from tests.synth import tissue_rgb, write_pyramid

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
    write_pyramid(folder / "slides" / "large.tif", tissue_rgb(613, 487), levels=1, mpp=None)
    (folder / "slides" / "link.png").symlink_to(folder / "elsewhere" / "secret.png")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, int]]:
    env = {"IPS_ALLOWED_ROOTS": f"{folder / 'slides'},s3://hospital/slides", "IPS_MAX_ROWS": "50", "PYTHONPATH": ""}
    with serve_model(str(folder / "model"), folder, env) as found:
        yield found


@pytest.fixture
def url(server: tuple[str, int]) -> str:
    return server[0]


def _ask(url: str, **body: Any) -> tuple[int, Any]:
    assert NODE is not None
    command = [NODE, "--input-type=module", "--eval", ASK, url, json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
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


def test_what_params_ask_for_comes_as_columns_and_from_allowed_places_alone(url: str, folder: Path) -> None:
    uris = [str(folder / place) for place in ("slides/good.png", "elsewhere/secret.png")]
    asked = {"attention": True, "top_k": 3, "explain": True}
    status, answer = _ask(url, dataframe_records=[{"uri": uri} for uri in uris], params=asked)
    assert status == 200
    good, outside = answer["predictions"]
    assert list(good) == ["uri", "tumour_no", "tumour_yes", "patch", "patches", "top", "curves", "error"]
    model, config = load_model(folder / "own")
    slide = predict_slide(model, config, CohortSlide("good", uris[0], "p", None, None, {}, {}), pooled=True)
    said = explain(model, config.tasks, slide.found, slide.key)
    assert said is not None
    maps = {name: good["patches"][name] for name in ("x", "y", "attention")}
    for name, values in maps.items():
        assert values == pytest.approx(slide.attention[name].to_pylist(), abs=1e-6)
    for output, effects in said.effect.items():
        assert good["patches"][f"effect_{output}"] == pytest.approx(effects.tolist(), abs=1e-5)
    best = sorted(range(slide.attention.num_rows), key=lambda row: (-maps["attention"][row], row))[:3]
    assert [one["row"] for one in good["top"]] == best
    assert good["top"][0]["x"] == maps["x"][best[0]]
    assert good["patch"] == slide.extent
    assert good["curves"]["fraction"] == said.curves["fraction"]
    for order in ("attention", "effect"):
        own, here = good["curves"][order]["deletion"]["tumour_yes"], said.curves[order]["deletion"]["tumour_yes"]
        assert own[:-1] == pytest.approx(here[:-1], abs=1e-5)
    assert "this host does not serve files from there" in outside["error"]
    assert {outside[name] for name in ("tumour_yes", "patch", "patches", "top", "curves")} == {None}


def test_bad_params_are_refused_by_name(url: str, folder: Path) -> None:
    rows = [{"uri": str(folder / "slides" / "good.png")}]
    for params, said in (
        ({"topk": 3, "attention": True}, "['topk'] are unknown; there are attention, top_k, explain and intervals"),
        ({"top_k": "many"}, "'top_k'"),
        ({"top_k": 1.5}, "'top_k'"),
        ({"attention": "yes"}, "'attention'"),
        ({"explain": [True]}, "'explain'"),
        ({"top_k": -1}, "top_k is -1; give a number from 0"),
        ([3], "Parameters must be a dictionary"),
    ):
        status, answer = _ask(url, dataframe_records=rows, params=params)
        assert status == 400, params
        assert said in answer["message"], params
    status, answer = _ask(url, dataframe_records=rows, params={"top_k": None})
    assert (status, list(answer["predictions"][0])) == (200, ["uri", "tumour_no", "tumour_yes", "error"])


@pytest.mark.timeout(600)
def test_fifty_slides_take_the_memory_of_a_few(server: tuple[str, int], folder: Path) -> None:
    """Of the server and the process that reads for it. The patches of each are 0.8 MB of pixels."""
    url, process = server
    slide = {"uri": str(folder / "slides" / "large.tif")}
    asked = {"top_k": 3, "explain": True}
    held = []
    for count in (10, 50):
        status, answer = _ask(url, dataframe_records=[slide] * count, params=asked)
        assert (status, len(answer["predictions"])) == (200, count)
        assert {one["error"] for one in answer["predictions"]} == {None}
        held.append(_held(process))
    print(*(f"{each / 1e6:.0f} MB" for each in held))  # with `pytest -s`
    assert held[1] - held[0] < 24 * 2**20, held


def _held(process: int) -> int:
    """Bytes of memory of a process and all below it."""
    server = psutil.Process(process)
    return sum(one.memory_info().rss for one in (server, *server.children(recursive=True)))


def test_too_much_and_nonsense_are_refused_in_json(url: str) -> None:
    status, answer = _ask(url, dataframe_records=[{"uri": "a.svs"}] * 51)
    assert status == 400
    assert "51 slides in one request, and 50 are allowed (IPS_MAX_ROWS)" in answer["message"]
    status, answer = _ask(url, dataframe_records=[{"slide": "a.svs"}])
    assert status == 400
    assert "uri" in answer["message"]
