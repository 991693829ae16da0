"""Which slides, in which version, and which of them a model knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.errors import CohortError, ConfigError
from pipeline.model.folder import Seen
from pipeline.sweep.cohorts import SweptCohort, check_unseen, read_cohorts
from pipeline.sweep.models import resolve_models
from tests.pipeline.small import write_slide
from tests.pipeline.sweep.made import made_cells, made_cohort
from tests.pipeline.sweep.small_sweep import SLIDES, sweep_config, write_cohort, write_model


def _read(tmp_path: Path, mlflow_uri: str, cohorts: Mapping[str, object]) -> list[SweptCohort]:
    folder = write_model(tmp_path / "one", 3)
    config = sweep_config(tmp_path, mlflow_uri, {"one": str(folder)}, cohorts=cohorts)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    for old in scratch.iterdir():
        old.rename(tmp_path / f"old-{len(list(tmp_path.iterdir()))}")
    models, _ = resolve_models(config, scratch)
    return read_cohorts(config, models[0])


def test_slides_are_told_apart_by_version_and_named_by_the_manifest(tmp_path: Path, mlflow_uri: str) -> None:
    write_cohort(tmp_path)
    place = {"all": str(tmp_path / "cohort.csv")}
    (first,) = _read(tmp_path, mlflow_uri, place)
    assert len(set(first.sources)) == len(first.slides) == SLIDES
    (again,) = _read(tmp_path, mlflow_uri, place)
    assert (again.sources, again.digest) == (first.sources, first.digest)
    write_slide(tmp_path / "s0.png", 99)
    (changed,) = _read(tmp_path, mlflow_uri, place)
    assert [a == b for a, b in zip(changed.sources, first.sources, strict=True)] == [False, *[True] * (SLIDES - 1)]
    text = (tmp_path / "cohort.csv").read_text()
    (tmp_path / "cohort.csv").write_text(text.replace("s1,s1.png,p0,yes", "s1,s1.png,p0,no"))
    (relabelled,) = _read(tmp_path, mlflow_uri, place)
    assert relabelled.sources == changed.sources
    assert relabelled.digest != changed.digest


def test_a_split_is_drawn_as_for_training(tmp_path: Path, mlflow_uri: str) -> None:
    write_cohort(tmp_path)
    uri = str(tmp_path / "cohort.csv")
    parts = _read(tmp_path, mlflow_uri, {name: {"uri": uri, "split": name} for name in ("train", "val", "test")})
    slides = [slide.slide_id for part in parts for slide in part.slides]
    assert sorted(slides) == sorted(f"s{n}" for n in range(SLIDES))
    patients = [set(part.patients) for part in parts]
    assert not patients[0] & patients[2]
    with pytest.raises(ConfigError, match="a and b are the same slides"):
        _read(tmp_path, mlflow_uri, {"a": uri, "b": uri})
    (tmp_path / "only.csv").write_text("slide_id,uri,split,label\ns0,s0.png,train,yes\n")
    with pytest.raises(CohortError, match="no slide in split test"):
        _read(tmp_path, mlflow_uri, {"only": {"uri": str(tmp_path / "only.csv"), "split": "test"}})


def test_what_a_model_knows_is_found_by_patient_by_key_and_by_content() -> None:
    cohort = made_cohort(9)
    cohort = SweptCohort(cohort.name, cohort.uri, cohort.slides, cohort.sources, {"s4": "stored"})

    def known(slides: set[str], patients: set[str]) -> list[str]:
        return cohort.known_to(
            Seen(frozenset(slides), frozenset(map(Seen.patient, patients))), {"source8": {"content"}}
        )

    assert known(set(), set()) == []
    assert known(set(), {"p1", "p9"}) == ["s2", "s3"]
    assert known({"stored"}, set()) == ["s4"]
    assert known({"content"}, {"p0"}) == ["s0", "s1", "s8"]


def test_all_models_that_know_slides_are_named_at_once() -> None:
    cohort = made_cohort(9)
    models = [cell.scoring.model for cell in made_cells(cohort, ["a", "b", "c"])]
    for model, patients in zip(models, ({"p0"}, set(), {"p1", "p2"}), strict=True):
        seen = Seen(frozenset(), frozenset(map(Seen.patient, patients)))
        object.__setattr__(model, "seen", seen)
    with pytest.raises(ConfigError) as caught:
        check_unseen(cohort, models, {})
    assert [problem.partition(" was trained")[0] for problem in caught.value.problems] == [
        "sweep.cohorts.all: a",
        "sweep.cohorts.all: c",
    ]
