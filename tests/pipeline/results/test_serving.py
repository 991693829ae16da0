from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest

from tests.pipeline.small import small_config, write_model, write_sections, write_slide

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*inferred as AnyType")  # MLflow's of its own code, at this import
    from mlflow.pyfunc import PythonModelContext

    from pipeline.results.serving import SlideModel


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> PythonModelContext:
    folder = write_model(tmp_path_factory.mktemp("model"), small_config())
    return PythonModelContext({"weights": str(folder / "weights.safetensors")}, None)


def test_rows_come_back_in_order_and_a_bad_slide_keeps_its_reason(
    context: PythonModelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SlideModel()
    model.load_context(context)
    write_slide(tmp_path / "b.png", 1)
    write_slide(tmp_path / "a.png", 2)
    (tmp_path / "empty.svs").touch()
    monkeypatch.chdir(tmp_path)
    uris = [str(tmp_path / "b.png"), "empty.svs", "a.png", "gs://bucket/x.svs", None]
    answer = model.predict(context, pd.DataFrame({"uri": uris, "mpp": [None, 0.5, 0.25, None, None]}))
    assert list(answer.columns) == ["uri", "tumour_no", "tumour_yes", "error"]
    assert answer["uri"].tolist()[:4] == uris[:4]
    assert answer["uri"].isna().tolist() == [False] * 4 + [True]
    assert answer["tumour_no"][0] + answer["tumour_yes"][0] == pytest.approx(1.0)
    assert answer["tumour_yes"].isna().tolist() == [False, True, False, True, True]
    assert "empty.svs" in answer["error"][1]
    assert answer["error"].isna().tolist() == [True, False, True, False, False]
    assert "gs://bucket/x.svs" in answer["error"][3]
    assert "uri is missing" in answer["error"][4]


def test_a_series_is_the_image_that_is_predicted(context: PythonModelContext, tmp_path: Path) -> None:
    model = SlideModel()
    model.load_context(context)
    path = write_sections(tmp_path / "two.tif")
    answer = model.predict(context, pd.DataFrame({"uri": [str(path)] * 4, "series": [0, 1, None, 0.5]}))
    assert answer["error"].isna().tolist() == [True, True, False, False]
    assert answer["tumour_yes"][0] != answer["tumour_yes"][1]
    assert "several images could be the slide: series 0 of 211 x 157 px, series 1 of 211 x 157 px" in answer["error"][2]
    assert answer["error"][3] == "series 0.5 is no whole number from 0"


def test_microns_that_are_missing_are_asked_for_in_their_column(tmp_path: Path) -> None:
    folder = write_model(tmp_path, small_config(tiling={"patch_px": 32, "mpp": 0.5, "min_tissue": 0.5}))
    write_slide(tmp_path / "a.png", 2)
    model = SlideModel()
    model.load_context(PythonModelContext({"weights": str(folder / "weights.safetensors")}, None))
    (error,) = model.predict(None, pd.DataFrame({"uri": [str(tmp_path / "a.png")]}))["error"]
    fact = "the file states no microns per px (of a plain image its resolution is not taken)"
    assert error == f"{fact}; give it in the column mpp"


def test_no_rows_give_an_empty_answer(context: PythonModelContext) -> None:
    model = SlideModel()
    model.load_context(context)
    assert model.predict(context, pd.DataFrame({"uri": []})).empty
