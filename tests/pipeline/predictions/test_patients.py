"""A patient of several slides: one prediction, a folder for each slide, and all or none of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cohort.table import CohortSlide
from pipeline.errors import CohortError
from pipeline.inference.explain import explain
from pipeline.inference.heatmap import Heatmap, overlay_png
from pipeline.inference.prediction import load_model, predict_together
from pipeline.predictions import finish
from pipeline.predictions.output import Failure, Outcome
from pipeline.predictions.patients import bags_of, share_outcomes, with_others
from pipeline.predictions.run import predict
from pipeline.predictions.slide import Job
from tests.pipeline.small import small_config, write_model, write_slide

PATIENTS = {"uri": "c.csv", "bag": "patient"}


def test_slides_of_a_patient_are_together_and_named_ones_alone() -> None:
    whose = ["p", None, "q", "p", None]
    assert bags_of(whose, small_config(cohort=PATIENTS)) == [[0, 3], [1], [2], [4]]
    assert bags_of(whose, small_config()) == [[0], [1], [2], [3], [4]]


def test_a_folder_follows_from_all_of_a_patient_s_slides() -> None:
    jobs = [Job(CohortSlide(name, name, "p", None, None, {}, {}), "", {}, name) for name in "abc"]
    first, second, alone = with_others(jobs, [[0, 1], [2]])
    assert alone == jobs[2]
    assert len({first.identity, second.identity, "a", "b"}) == 4
    other = with_others([jobs[0], jobs[2]], [[0, 1]])[0]
    assert other.identity != first.identity


def test_a_patient_is_predicted_whole_or_not_at_all() -> None:
    done: dict[str, Any] = {"identity": "x"}
    bad = Failure("missing", "gone")
    outcomes: list[Outcome | None] = [done, None, done, bad, done, bad]
    share_outcomes(outcomes, [[0, 1], [2, 3], [4], [5]], list("abcdef"))
    assert outcomes == [None, None, Failure("missing", "slide 'd' of this patient: gone"), bad, done, bad]


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a cohort of four patients: of three slides, of one that is absent and one good, and two of one."""
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model", small_config(cohort=PATIENTS))
    for number in range(5):
        write_slide(tmp_path / f"{number}.png", number)
    rows = "a,0.png,p\nb,1.png,q\nc,2.png,p\nd,absent.png,q\ne,3.png,\nf,4.png,p\n"
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,patient_id\n{rows}")
    return folder, tmp_path / "cohort.csv"


def test_one_prediction_a_patient_and_maps_of_each_slide(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, listed = cohort
    out = tmp_path / "out"
    drawn: dict[str, Any] = {}

    def watched(slide: Heatmap, top: float, *, caption: Sequence[str], clipped: bool) -> bytes:
        drawn[caption[0]] = slide.ratio
        return overlay_png(slide, top, caption=caption, clipped=clipped)

    monkeypatch.setattr(finish, "overlay_png", watched)
    slides = [str(tmp_path / "3.png")]
    result = predict(str(folder), slides, str(listed), out, tracking_uri="unused")
    assert (result["slides"], result["predicted_now"]) == (7, 5)  # the two of q are known to be no prediction
    assert list(result["failed"]) == ["b", "d"]
    assert result["failed"]["b"].startswith("slide 'd' of this patient: ")
    table = pq.read_table(out / "predictions.parquet").to_pydict()
    assert table["slide_id"] == ["3", "a", "b", "c", "d", "e", "f"]
    assert table["patient_id"] == [None, "p", "q", "p", "q", "e", "p"]
    assert table["folder"] == ["slides/3", "slides/a", None, "slides/c", None, "slides/e", "slides/f"]
    assert table["n_patches"] == [20, 20, 0, 20, 0, 20, 20]
    a, c, f = (table["tumour_yes"][place] for place in (1, 3, 6))
    assert a == c == f != table["tumour_yes"][5] == table["tumour_yes"][0]

    members = [CohortSlide(name, str(tmp_path / file), "p", None, None, {}, {}) for name, file in
               (("a", "0.png"), ("c", "2.png"), ("f", "4.png"))]  # fmt: skip
    model, config = load_model(folder)
    parts = predict_together(model, config, members, pooled=True)
    assert a == parts[0].values["tumour"][1]
    said = explain(model, config.tasks, parts[0].found, parts[0].key)
    assert said is not None
    every = {name: _files(out / "slides" / name) for name in "acf"}
    for part, (name, (facts, maps)) in zip(parts, every.items(), strict=True):
        assert maps["attention"].to_pylist() == part.attention["attention"].to_pylist()
        assert maps["selected"].to_pylist() == part.attention["selected"].to_pylist()
        score = (part.found.attention[part.rows].astype(np.float64) * 60).astype(np.float32)
        assert np.array_equal(maps["score"].to_numpy(), score)
        assert np.array_equal(maps["effect_tumour_yes"].to_numpy(), said.effect["tumour_yes"][part.rows])
        assert np.array_equal(drawn[name].astype(np.float32), score)
        assert facts["slide_id"] == name
        assert facts["curves"] == said.curves
        assert facts["n_patches"] == 20
        assert facts["selected"] == sum(maps["selected"].to_pylist())
        about = facts["patient"]
        assert (about["patient_id"], about["slides"], about["n_patches"]) == ("p", ["a", "c", "f"], 60)
        assert about["attention"] == pytest.approx(sum(maps["attention"].to_pylist()), abs=1e-5)
        assert "all slides of the patient" in facts["maps"]["attention"]["definition"]
        assert "of the attention over the patient's 3 slides is on this one" in facts["sentences"][1]
    assert sum(facts["patient"]["attention"] for facts, _ in every.values()) == pytest.approx(1, abs=1e-5)
    assert sum(facts["selected"] for facts, _ in every.values()) == 5
    assert "patient" not in _files(out / "slides" / "e")[0]
    assert "0.png, of the patient p" in (out / "summary.html").read_text()


def test_of_several_specimens_each_is_predicted_for_itself(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    _, listed = cohort
    (tmp_path / "blocks").mkdir()
    folder = write_model(tmp_path / "blocks", small_config(cohort={**PATIENTS, "specimen": "block"}))
    with pytest.raises(CohortError, match="cohort.specimen: no column 'block'"):
        predict(str(folder), [], str(listed), tmp_path / "out", tracking_uri="unused")
    rows = "a,0.png,p,x\nb,1.png,p,y\nc,2.png,p,x\nd,3.png,q,x\n"
    listed.write_text(f"slide_id,uri,patient_id,block\n{rows}")
    out = tmp_path / "out"
    predict(str(folder), [], str(listed), out, tracking_uri="unused")
    table = pq.read_table(out / "predictions.parquet").to_pydict()
    assert table["patient_id"] == ["p", "p", "p", "q"]
    a, b, c, d = table["tumour_yes"]
    assert a == c
    assert len({a, b, d}) == 3
    facts, _ = _files(out / "slides" / "a")
    assert facts["patient"]["slides"] == ["a", "c"]
    assert "all slides of the specimen" in facts["maps"]["attention"]["definition"]
    assert "of the attention over the specimen's 2 slides is on this one" in facts["sentences"][1]
    assert "of the patient p/x" in (out / "summary.html").read_text()


def test_a_patient_that_is_not_whole_or_has_another_slide_is_predicted_again(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, listed = cohort
    out = tmp_path / "out"

    def again() -> int:
        return int(predict(str(folder), [], str(listed), out, tracking_uri="unused")["predicted_now"])

    assert again() == 4
    assert again() == 0
    before = {path: path.read_bytes() for path in (out / "slides").rglob("*") if path.is_file()}
    (out / "slides" / "c" / "slide.json").unlink()
    assert again() == 3
    assert {path: path.read_bytes() for path in before} == before
    write_slide(tmp_path / "4.png", 9)
    assert again() == 3
    listed.write_text(listed.read_text().replace("f,4.png,p\n", ""))
    assert again() == 2


def _files(folder: Path) -> tuple[dict[str, Any], Any]:
    return json.loads((folder / "slide.json").read_text()), pq.read_table(folder / "attention.parquet")
