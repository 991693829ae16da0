"""One slide, good or bad: what its folder holds, and what is said where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError, StageError, StorageError
from pipeline.inference.prediction import load_model
from pipeline.ingest.isolated import apart
from pipeline.ingest.tiler import store_slide
from pipeline.model.folder import save_model, whole_digest
from pipeline.predictions import slide as slide_module
from pipeline.predictions.dicom import write_maps
from pipeline.predictions.output import Failure
from pipeline.predictions.slide import Job, Predicting, Predictor
from tests.pipeline.small import small_config, write_model, write_slide
from tests.pipeline.tiled import RGB, row, spoilt
from tests.synth import leica_xml, write_pyramid


def _job(path: Path) -> Job:
    return Job(row(path), "with --mpp", {"tumour": "yes"}, "identity")


def _predictor(folder: Path, out: Path, **tiling: object) -> Predictor:
    config = small_config(tiling={"patch_px": 64, "mpp": None, "min_tissue": 0.4, "edge": "drop", **tiling})
    return Predictor(
        Predicting(str(write_model(folder, config)), "models:/m/1", "digest", str(out), None, False, False, False)
    )


def test_a_patch_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    """A plan names it, and only reading finds out."""
    good = write_pyramid(tmp_path / "good.tiff", RGB, levels=1)
    predictor = _predictor(tmp_path, tmp_path / "out", max_bad_tiles=0.9)
    (whole,) = predictor.predict([_job(good)])
    (lost,) = predictor.predict([_job(spoilt("zeroed", good, tmp_path))])
    assert isinstance(whole, dict)
    assert isinstance(lost, dict)
    assert whole["n_bad_tiles"] == 0 < lost["n_bad_tiles"]
    assert lost["n_patches"] < whole["n_patches"]


def test_facts_say_what_there_is(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, levels=2)
    (facts,) = _predictor(tmp_path, tmp_path / "out").predict([_job(path)])
    assert isinstance(facts, dict)
    folder = tmp_path / "out" / "slides" / "a"
    assert json.loads((folder / "slide.json").read_text()) == facts
    assert (facts["model"], facts["labels"]) == ({"source": "models:/m/1", "digest": "digest"}, {"tumour": "yes"})
    assert (facts["dimensions"], facts["patch"], facts["stride"], facts["origin"]) == ([613, 487], 64.0, 64.0, [0, 0])
    table = pq.read_table(folder / "attention.parquet")
    assert len(table) == facts["n_patches"]
    chosen = table.filter(table["selected"])["attention"].to_pylist()
    assert sum(chosen) == pytest.approx(facts["attention_in_selected"], abs=1e-5)
    assert json.loads((folder / "tissue.geojson").read_text())["features"]


def test_what_is_wrong_with_a_slide_or_a_model_is_said_and_the_output_is_not_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = _predictor(tmp_path, tmp_path / "out")
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    (found,) = predictor.predict([_job(tmp_path / "bad.svs")])
    assert isinstance(found, Failure)
    assert found.reason == "not-a-slide"
    write_slide(tmp_path / "a.png", 2)

    def failing(*_: object, **__: object) -> None:
        raise ValueError("never seen before")

    monkeypatch.setattr(slide_module, "map_table", failing)
    assert predictor.predict([_job(tmp_path / "a.png")]) == [Failure("crash", "ValueError: never seen before")]
    monkeypatch.undo()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "slides").write_bytes(b"a file")
    with pytest.raises(StorageError, match="a folder of this path is a file"):
        predictor.predict([_job(tmp_path / "a.png")])


def test_numbers_that_are_none_are_no_prediction(tmp_path: Path) -> None:
    predictor = _predictor(tmp_path, tmp_path / "out", patch_px=32)
    model, config = load_model(tmp_path)
    state = {key: torch.full_like(x, torch.nan) if "heads.0:" in key else x for key, x in model.state_dict().items()}
    save_model(tmp_path, state, config)
    write_slide(tmp_path / "a.png", 2)
    again = Predictor(replace(predictor._asked))
    (found,) = again.predict([_job(tmp_path / "a.png")])
    assert isinstance(found, Failure)
    assert found.reason == "not-finite"


def test_a_store_of_before_that_does_not_say_the_bounds_is_read_with_those_of_the_file(tmp_path: Path) -> None:
    path, corner = tmp_path / "a.scn", (101, 67)
    sizes = [(613, 487), (306, 243), (153, 121)]
    write_pyramid(path, RGB, description=leica_xml(sizes, (900, 700), corner, 0.5))
    config = small_config(tiling={"patch_px": 64, "mpp": None, "min_tissue": 0.4, "edge": "drop"})
    store = tmp_path / "store"
    status = store_slide(row(path), config.tiling, str(store))
    (commit,) = store.glob(f"*/{status.key}/slide.json")
    facts = json.loads(commit.read_text())
    assert facts.pop("bounds") == [*corner, 613, 487]
    commit.write_text(json.dumps(facts))
    model = str(write_model(tmp_path, config))
    asked = Predicting(model, "m", "d", str(tmp_path / "out"), str(store), heads=False, all_patches=False, dicom=False)
    (found,) = Predictor(asked).predict([_job(path)])
    assert isinstance(found, dict)
    assert found["origin"] == list(corner)


def test_a_model_that_is_not_the_one_asked_for_predicts_nothing(tmp_path: Path) -> None:
    """Its numbers would stand under the other's name."""
    predictor = _predictor(tmp_path, tmp_path / "out")
    digest = whole_digest(tmp_path)
    assert callable(replace(predictor._asked, digest=digest).worker())
    with pytest.raises(StageError, match=f"holds the model {digest}, and not digest of models:/m/1"):
        predictor._asked.worker()


def test_nothing_of_another_prediction_is_left_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(tmp_path / "a.png", 2)
    predictor, folder = _predictor(tmp_path, tmp_path / "out", patch_px=32), tmp_path / "out" / "slides" / "a"
    predictor.predict([_job(tmp_path / "a.png")])
    names = {path.name for path in folder.iterdir()}
    for name in ("overlay.png", "all.geojson.gz", "effect_grade_g1.dcm", "notes.txt"):
        (folder / name).write_bytes(b"of before")
    predictor.predict([_job(tmp_path / "a.png")])
    assert {path.name for path in folder.iterdir()} == names | {"notes.txt"}  # which is not ours

    def full(*_: object) -> None:
        raise StorageError("no space is left")

    monkeypatch.setattr(slide_module, "write_bytes", full)
    with pytest.raises(StorageError, match="no space"):
        predictor.predict([_job(tmp_path / "a.png")])
    assert not (folder / "slide.json").exists()  # it would speak for files of two predictions


def test_a_map_that_failed_for_a_passing_reason_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(tmp_path / "a.png", 2)
    predictor = Predictor(replace(_predictor(tmp_path, tmp_path / "out", patch_px=32)._asked, dicom=True))
    (found,) = predictor.predict([_job(tmp_path / "a.png")])
    assert isinstance(found, dict)
    assert "no DICOM slide" in found["dicom"]["why"]

    def failing(reason: str, slide: CohortSlide, spec: TilingConfig, work: Callable[[], Any]) -> Any:
        if getattr(work, "func", None) is write_maps:
            raise SlideError(reason, f"a.png: {reason}")
        return apart(slide, spec, work)

    for reason in ("source", "crash"):
        monkeypatch.setattr(slide_module, "apart", partial(failing, reason))
        (lost,) = predictor.predict([_job(tmp_path / "a.png")])
        assert isinstance(lost, Failure)
        assert lost.reason == reason
        assert not (tmp_path / "out" / "slides" / "a" / "slide.json").exists()
    monkeypatch.undo()
    assert predictor.predict([_job(tmp_path / "a.png")]) == [found]
