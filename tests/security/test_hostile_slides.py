"""No file ends the process that tiles, predicts or serves, or costs more than it may; it gets its reason."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import csv

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest import child
from pipeline.ingest.graph import tile_cohort
from pipeline.ingest.isolated import store_slide
from pipeline.predictions.run import predict
from tests.pipeline.small import small_config, write_model
from tests.security.hostile import CATALOGUE, good_tiff

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*inferred as AnyType")  # MLflow's of its own code, at this import
    from mlflow.pyfunc import PythonModelContext

    from pipeline.results.serving import SlideModel

TILING = TilingConfig(patch_px=64, min_tissue=0.4, max_seconds=15)
CONFIG = small_config(tiling=TILING.model_dump())
COSTLY = {"5,000 deflated tiles of the same bytes", "a PNG of 16,000 px"}  # 5 s of CPU time each, 8 beside other work
CHEAP = [name for name in CATALOGUE if name not in COSTLY]
GIGABYTES = 1.5e9

each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in COSTLY else []) for name in CATALOGUE]
)
some_or_all = pytest.mark.parametrize(
    "names", [pytest.param(CHEAP, id="cheap"), pytest.param(list(CATALOGUE), id="all", marks=pytest.mark.slow)]
)


def made(names: list[str], folder: Path) -> list[tuple[str, float | None]]:
    """URIs and microns of the catalogue's files, with a good slide before and behind them."""
    rows: list[tuple[str, float | None]] = [(str(good_tiff(folder, "first.tiff")), None)]
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        rows.append((CATALOGUE[name].make(folder / str(number)), CATALOGUE[name].mpp))
    return [*rows, (str(good_tiff(folder, "last.tiff")), None)]


def told(names: list[str], errors: list[str | None]) -> None:
    """The good slides have no error; the others have one, unless there is nothing wrong with their pixels."""
    for name, error in zip(["", *names, ""], errors, strict=True):
        assert bool(error) == bool(name and CATALOGUE[name].reasons), (name, error)


def peak() -> int:
    """Bytes that the process which reads slides has held at most; one that was stopped held what it may."""
    status = child.run(Path("/proc/self/status").read_text, child.Limits(60, 4))
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), CONFIG)


@each
def test_a_hostile_file_is_quarantined_with_its_reason(name: str, tmp_path: Path) -> None:
    hostile, began = CATALOGUE[name], time.monotonic()
    row = CohortSlide(name, hostile.make(tmp_path), name, None, hostile.mpp, {}, {})
    status = store_slide(row, TILING, str(tmp_path / "store"))
    assert time.monotonic() - began < 60
    if hostile.reasons:
        assert status.status == "quarantined"
        assert str(status.reason).partition(":")[0] in hostile.reasons, status.error
        assert len(str(status.reason)) < 1000
    assert peak() < GIGABYTES


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_the_tile_stage_takes_the_good_ones(tmp_path: Path, ray_session: None) -> None:
    rows = made(list(CATALOGUE), tmp_path)
    slides = [CohortSlide(str(i), uri, str(i), None, mpp, {}, {}) for i, (uri, mpp) in enumerate(rows)]
    statuses = tile_cohort(slides, TILING, str(tmp_path / "store"), cpus=1, on_status=lambda status: None)
    told(list(CATALOGUE), [status.reason for status in statuses])


@some_or_all
def test_a_server_answers_every_row(names: list[str], folder: Path, tmp_path: Path) -> None:
    context, model = PythonModelContext({"weights": str(folder / "weights.safetensors")}, None), SlideModel()
    model.load_context(context)
    names = [name for name in names if name != "half a character in its name"]  # pandas holds no such text
    rows = made(names, tmp_path)
    answer = model.predict(context, pd.DataFrame(rows, columns=["uri", "mpp"]))
    assert answer["uri"].tolist() == [uri for uri, _ in rows]
    names = ["" if CATALOGUE[name].mpp != CATALOGUE[name].mpp else name for name in names]  # NaN is none here
    told(names, [None if pd.isna(error) else error for error in answer["error"]])
    assert answer["tumour_yes"].isna().tolist() == [isinstance(error, str) for error in answer["error"]]


@some_or_all
def test_predict_goes_on(names: list[str], folder: Path, tmp_path: Path) -> None:
    """By URI, where all have the same microns; a cohort refuses wrong ones by row."""
    names = [name for name in names if CATALOGUE[name].mpp in (None, 0.5)]
    uris = [uri for uri, _ in made(names, tmp_path)]
    result = predict(str(folder), uris, None, tmp_path / "out", tracking_uri="unused", mpp=0.5)
    table = csv.read_csv(tmp_path / "out" / "predictions.csv").to_pydict()
    found = [name for name in names if "infinite" not in name and "entities" not in name]
    assert len(result["failed"]) == len(found) - sum(not CATALOGUE[name].reasons for name in found)
    assert table["tumour_yes"][0] is not None
    assert table["tumour_yes"][-1] is not None


@pytest.mark.parametrize("mpp", [float("inf"), float("nan"), 0.0, -1.0])
def test_microns_that_cannot_be_are_each_slides_error(mpp: float, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"none of 1 slides could be predicted") as caught:
        predict(str(folder), [str(good_tiff(tmp_path))], None, tmp_path / "out", tracking_uri="unused", mpp=mpp)
    assert "microns per px is outside" in str(caught.value)
